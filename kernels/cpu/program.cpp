// torch.classes.sluice_cpu.Program: a list of operator calls, made once and run again without Python between them; and Running, one of its
// runs beside whatever the caller does.
//
// Values live in registers: the inputs first, then what each call gives. A register is let go after the last call that reads it.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
#include <torch/custom_class.h>

#include "thread_pool.h"

namespace {

using c10::IValue;

struct Call {
    c10::OperatorHandle op;
    std::vector<IValue> constants;  // one an argument; nothing where a register is read
    std::vector<int64_t> reads;     // one an argument: its register, -1 = the constant
    std::vector<int64_t> writes;    // one a value given: its register, -1 = nobody reads it
    std::vector<int64_t> done;      // registers that no later call reads
};

class Program : public torch::CustomClassHolder {
public:
    explicit Program(int64_t num_inputs) : num_inputs_(num_inputs), num_registers_(num_inputs) {
        TORCH_CHECK(num_inputs >= 0, "num_inputs must not be negative");
    }

    // `arguments`: a tuple, one for each of `reads`; arguments beyond them take the operator's defaults. Gives the first of `num_values`
    // new registers.
    int64_t call(const std::string& name, const std::string& overload, const IValue& arguments, std::vector<int64_t> reads,
                 int64_t num_values) {
        TORCH_CHECK(!finished_, "the program is finished");
        Call made{c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str()), {}, std::move(reads), {}, {}};
        const auto& schema = made.op.schema();
        TORCH_CHECK(arguments.isTuple(), "arguments must be a tuple");
        made.constants = arguments.toTupleRef().elements().vec();
        TORCH_CHECK(made.constants.size() == made.reads.size() && made.reads.size() <= schema.arguments().size(), name,
                    ": one register for each argument, no more than it takes");
        TORCH_CHECK(num_values == (int64_t)schema.returns().size() || list_of_tensors(schema), name, ": gives another number of values");
        for (size_t i = 0; i < made.reads.size(); ++i) {
            TORCH_CHECK(made.reads[i] >= -1 && made.reads[i] < num_registers_, "register ", made.reads[i], " has no value yet");
            if (made.reads[i] >= 0) made.constants[i] = IValue();
        }
        for (size_t i = made.reads.size(); i < schema.arguments().size(); ++i) {
            TORCH_CHECK(schema.arguments()[i].default_value().has_value(), name, ": argument ", i, " is missing");
            made.constants.push_back(*schema.arguments()[i].default_value());
            made.reads.push_back(-1);
        }
        const int64_t first = num_registers_;
        for (int64_t i = 0; i < num_values; ++i) made.writes.push_back(num_registers_++);
        calls_.push_back(std::move(made));
        return first;
    }

    // What `run` gives; no call can be added after it.
    void finish(int64_t result) {
        TORCH_CHECK(!finished_ && result >= 0 && result < num_registers_, "register ", result, " has no value");
        result_ = result;
        std::vector<bool> read(num_registers_, false);
        read[result] = true;
        for (auto call = calls_.rbegin(); call != calls_.rend(); ++call) {
            for (int64_t& write : call->writes) {
                if (!read[write]) write = -1;
            }
            for (int64_t from : call->reads) {
                if (from < 0 || read[from]) continue;
                read[from] = true;
                call->done.push_back(from);
            }
        }
        finished_ = true;
    }

    at::Tensor run(const std::vector<at::Tensor>& inputs) const {
        TORCH_CHECK(finished_ && (int64_t)inputs.size() == num_inputs_, "run takes ", num_inputs_, " inputs of a finished program");
        std::vector<IValue> values(num_registers_);
        for (int64_t i = 0; i < num_inputs_; ++i) values[i] = inputs[i];
        torch::jit::Stack stack;
        for (const Call& call : calls_) {
            stack.clear();
            for (size_t i = 0; i < call.reads.size(); ++i) stack.push_back(call.reads[i] < 0 ? call.constants[i] : values[call.reads[i]]);
            call.op.callBoxed(stack);
            if (list_of_tensors(call.op.schema())) spread(stack);
            TORCH_CHECK(stack.size() == call.writes.size(), call.op.schema().name(), " gave ", stack.size(), " values");
            for (size_t i = 0; i < call.writes.size(); ++i) {
                if (call.writes[i] >= 0) values[call.writes[i]] = std::move(stack[i]);
            }
            for (int64_t done : call.done) values[done] = IValue();
        }
        return values[result_].toTensor();
    }

private:
    static bool list_of_tensors(const c10::FunctionSchema& schema) {
        return schema.returns().size() == 1 && schema.returns()[0].type()->kind() == c10::TypeKind::ListType;
    }

    static void spread(torch::jit::Stack& stack) {
        const c10::List<at::Tensor> list = stack.back().toTensorList();
        stack.pop_back();
        for (const at::Tensor& one : list) stack.emplace_back(one);
    }

    int64_t num_inputs_;
    int64_t num_registers_;
    int64_t result_ = -1;
    bool finished_ = false;
    std::vector<Call> calls_;
};

// Keeps the inputs until it is over: Python's own are let go by a thread that holds Python's lock.
class Running : public torch::CustomClassHolder {
public:
    Running(c10::intrusive_ptr<Program> program, std::vector<at::Tensor> inputs)
        : program_(std::move(program)), inputs_(std::move(inputs)), inference_(c10::InferenceMode::is_enabled()) {
        sluice::TasksBeside::instance().begin([this] { run(); }, done_);
    }

    ~Running() override { wait(); }

    // Waits and helps.
    void wait() { sluice::TasksBeside::instance().wait(done_); }

    // Then raises what the run raised.
    void synchronize() {
        wait();
        if (error_) std::rethrow_exception(error_);
    }

private:
    void run() {
        try {
            const c10::InferenceMode mode(inference_);
            program_->run(inputs_);
        } catch (...) {
            error_ = std::current_exception();
        }
    }

    const c10::intrusive_ptr<Program> program_;
    const std::vector<at::Tensor> inputs_;
    const bool inference_;
    std::exception_ptr error_;
    std::atomic<uint32_t> done_{0};
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(sluice_cpu, library) {
    auto program = library.class_<Program>("Program")
                       .def(torch::init<int64_t>())
                       .def("call", &Program::call)
                       .def("finish", &Program::finish)
                       .def("run", &Program::run);
    library.class_<Running>("Running").def("wait", &Running::wait).def("synchronize", &Running::synchronize);
    // What it gives is what it writes into its inputs and into what it keeps.
    program.def("start", [](const c10::intrusive_ptr<Program>& self, std::vector<at::Tensor> inputs) {
        return c10::make_intrusive<Running>(self, std::move(inputs));
    });
}
