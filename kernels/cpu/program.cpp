// torch.classes.sluice_cpu.Program: a list of operator calls, made once and run again without Python between them; and Running, one of its
// runs beside whatever the caller does.
//
// Values live in registers: the inputs first, then what each call gives. Operators that can be prepared (prepared_calls.h) are, one after
// another, and run together where a call comes that cannot. What they give has a place in memory, the same in every run; a call that
// reads nothing but such places and constants is prepared in the first run, once and for all. Of a layer's calls, that leaves attention.
// Where inputs have other numbers of rows than in the run before, all of it is done anew.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
#include <torch/custom_class.h>

#include <bit>

#include "prepared_calls.h"
#include "thread_pool.h"

namespace {

using at::Tensor;
using c10::IValue;
using sluice::PreparedCall;

// Memory for what the program that a thread runs gives and reads, one program at a time. It is kept: up to four times what the largest
// run takes, since blocks are of few sizes.
struct Workspace {
    std::vector<Tensor> blocks;  // bytes

    static const std::shared_ptr<Workspace>& of_this_thread() {
        static thread_local const auto workspace = std::make_shared<Workspace>();
        return workspace;
    }

    // The number of the smallest block of at least so many bytes that `is_free(number)`.
    template <class IsFree>
    size_t find(int64_t bytes, const IsFree& is_free) {
        size_t best = blocks.size();
        for (size_t i = 0; i < blocks.size(); ++i) {
            if (blocks[i].numel() < bytes || !is_free(i)) continue;
            if (best == blocks.size() || blocks[i].numel() < blocks[best].numel()) best = i;
        }
        // Of few sizes: programs of other numbers of rows take the same.
        constexpr int64_t least = 4096;
        if (best == blocks.size()) {
            const c10::InferenceMode any_mode(false);
            blocks.push_back(at::empty({(int64_t)std::bit_ceil((uint64_t)std::max(bytes, least))}, at::kByte));
        }
        return best;
    }
};

struct Register {
    int64_t root;            // the first register with this one's memory
    int64_t last_read = -1;  // of a root: the last call that reads that memory
    bool fixed = false;      // whether every run has it in the same place,
    size_t block = 0;        // in which block of the workspace, where a root has one
    IValue value;
};

struct Call {
    enum class Kind { prepared, view, immediate };

    c10::OperatorHandle op;
    Kind kind;
    std::vector<IValue> constants;  // one an argument; nothing where a register is read
    std::vector<int64_t> reads;     // one an argument: its register, -1 = the constant
    int64_t first_write;            // registers from here on, one a value given
    int64_t num_writes;
    std::vector<int64_t> done;  // registers that no later call reads
    bool settled = false;       // nothing is left to a run but `prepared`
    PreparedCall prepared;
};

class Program : public torch::CustomClassHolder {
public:
    explicit Program(int64_t num_inputs) : num_inputs_(num_inputs) {
        TORCH_CHECK(num_inputs >= 0, "num_inputs must not be negative");
        for (int64_t i = 0; i < num_inputs; ++i) add_register(-1);
    }

    // `arguments`: a tuple, one for each of `reads`; arguments beyond them take the operator's defaults. `shares`: of each value given, a
    // register that has the same memory, or -1. Gives the first of as many new registers.
    int64_t call(const std::string& name, const std::string& overload, const IValue& arguments, std::vector<int64_t> reads,
                 const std::vector<int64_t>& shares) {
        TORCH_CHECK(!finished_, "the program is finished");
        Call made{c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str()), Call::Kind::immediate, {}, std::move(reads),
                  (int64_t)registers_.size(), (int64_t)shares.size(), {}, false, {}};
        const auto& schema = made.op.schema();
        made.kind = kind_of(schema, shares);
        TORCH_CHECK(arguments.isTuple(), "arguments must be a tuple");
        made.constants = arguments.toTupleRef().elements().vec();
        TORCH_CHECK(made.constants.size() == made.reads.size() && made.reads.size() <= schema.arguments().size(), name,
                    ": one register for each argument, no more than it takes");
        TORCH_CHECK(shares.size() == schema.returns().size() || list_of_tensors(schema), name, ": gives another number of values");
        for (size_t i = 0; i < made.reads.size(); ++i) {
            check_register(made.reads[i]);
            if (made.reads[i] >= 0) made.constants[i] = IValue();
        }
        for (size_t i = made.reads.size(); i < schema.arguments().size(); ++i) {
            TORCH_CHECK(schema.arguments()[i].default_value().has_value(), name, ": argument ", i, " is missing");
            made.constants.push_back(*schema.arguments()[i].default_value());
            made.reads.push_back(-1);
        }
        for (int64_t from : shares) {
            check_register(from);
            add_register(from);
        }
        calls_.push_back(std::move(made));
        return calls_.back().first_write;
    }

    // What `run` gives; no call can be added after it.
    void finish(int64_t result) {
        TORCH_CHECK(!finished_ && result >= 0 && result < (int64_t)registers_.size(), "register ", result, " has no value");
        result_ = result;
        std::vector<bool> read(registers_.size(), false);
        read[result] = true;
        for (int64_t i = (int64_t)calls_.size() - 1; i >= 0; --i) {
            for (int64_t from : calls_[i].reads) {
                if (from < 0) continue;
                int64_t& last = registers_[registers_[from].root].last_read;
                last = std::max(last, i);
                if (read[from]) continue;
                read[from] = true;
                calls_[i].done.push_back(from);
            }
        }
        finished_ = true;
    }

    // The same calls, of which nothing has run yet: what is prepared for one number of rows stays while another's runs.
    c10::intrusive_ptr<Program> copy() const {
        TORCH_CHECK(finished_, "only a finished program can be copied");
        auto made = c10::make_intrusive<Program>(num_inputs_);
        made->result_ = result_;
        made->finished_ = true;
        made->registers_.clear();
        for (const Register& one : registers_) made->registers_.push_back({one.root, one.last_read, false, 0, IValue()});
        for (const Call& call : calls_) {
            made->calls_.push_back({call.op, call.kind, call.constants, call.reads, call.first_write, call.num_writes, call.done, false, {}});
        }
        return made;
    }

    // What it gives no other run touches. One run at a time.
    Tensor run(const std::vector<Tensor>& inputs) {
        TORCH_CHECK(finished_ && (int64_t)inputs.size() == num_inputs_, "run takes ", num_inputs_, " inputs of a finished program");
        const Alone alone(*this);
        const std::shared_ptr<Workspace>& workspace = Workspace::of_this_thread();
        std::vector<int64_t> rows = rows_of(inputs);
        const bool first = workspace_ != workspace || operators_ != &sluice::operators() || rows_ != rows;
        if (first) begin_anew();
        for (int64_t i = 0; i < num_inputs_; ++i) registers_[i].value = inputs[i];
        int64_t ran = 0, count = (int64_t)calls_.size();
        for (int64_t i = 0; i < count; ++i) {
            Call& call = calls_[i];
            if (call.settled) continue;
            if (call.kind == Call::Kind::immediate) ran = run_prepared(ran, i);
            Output output(*this, *workspace, i);
            make(call, output);
            if (first) settle(call);
        }
        run_prepared(ran, count);
        workspace_ = workspace;
        operators_ = &sluice::operators();
        rows_ = std::move(rows);
        return registers_[result_].value.toTensor();
    }

private:
    // A run: what is not fixed ends with it, while whoever began it still holds the inputs: the last to let go of a tensor of Python's needs
    // Python's lock, which the waiter may have.
    class Alone {
    public:
        explicit Alone(Program& program) : program_(program) {
            TORCH_CHECK(!program.running_.test_and_set(std::memory_order_acquire), "the program is running");
        }
        ~Alone() {
            program_.stack_.clear();
            for (Register& one : program_.registers_) {
                if (!one.fixed) one.value = IValue();
            }
            program_.running_.clear(std::memory_order_release);
        }

    private:
        Program& program_;
    };

    // Where the call of that number writes.
    class Output : public sluice::Preparing::Place {
    public:
        Output(Program& program, Workspace& workspace, int64_t call) : program_(program), workspace_(workspace), call_(call) {}

        Tensor make(at::IntArrayRef sizes, at::ScalarType type) override {
            Register& to = program_.registers_[program_.calls_[call_].first_write];
            if (to.fixed) {
                const Tensor placed = to.value.toTensor();
                TORCH_CHECK(placed.sizes() == sizes && placed.scalar_type() == type, "the program was recorded for other shapes");
                return placed;
            }
            if (to.root == program_.registers_[program_.result_].root) return at::empty(sizes, type);
            std::vector<int64_t>& taken = program_.taken_until_;
            const int64_t bytes = c10::multiply_integers(sizes) * (int64_t)c10::elementSize(type);
            const Register* residual = residual_to_write_over(sizes, type);
            to.block = residual ? residual->block
                                : workspace_.find(bytes, [&](size_t i) { return i >= taken.size() || taken[i] < call_; });
            taken.resize(workspace_.blocks.size(), -1);
            taken[to.block] = std::max(program_.registers_[to.root].last_read, call_);
            to.fixed = true;
            const c10::InferenceMode any_mode(false);  // later runs may be in another
            to.value = workspace_.blocks[to.block].narrow(0, 0, bytes).view(type).view(sizes);
            return to.value.toTensor();
        }

    private:
        // What the call adds to a product, if nobody reads it after or beside that: each number of it is read by whoever writes the sum.
        // A prompt's hidden states then pass through the caches once a product, not twice.
        const Register* residual_to_write_over(at::IntArrayRef sizes, at::ScalarType type) const {
            const Call& call = program_.calls_[call_];
            const auto at = call.op.schema().argumentIndexWithName("residual");
            if (!at || call.reads[*at] < 0) return nullptr;
            const int64_t from = call.reads[*at];
            const Register& residual = program_.registers_[from];
            if (!residual.fixed || residual.last_read != call_) return nullptr;  // of a view there is no last read
            for (size_t i = 0; i < call.reads.size(); ++i) {
                if (i != (size_t)*at && call.reads[i] >= 0 && program_.registers_[call.reads[i]].root == from) return nullptr;
            }
            const Tensor& value = residual.value.toTensor();
            return value.sizes() == sizes && value.scalar_type() == type ? &residual : nullptr;
        }

        Program& program_;
        Workspace& workspace_;
        int64_t call_;
    };

    static bool list_of_tensors(const c10::FunctionSchema& schema) {
        return schema.returns().size() == 1 && schema.returns()[0].type()->kind() == c10::TypeKind::ListType;
    }

    // A view gives memory that it is given and neither reads nor writes it.
    static Call::Kind kind_of(const c10::FunctionSchema& schema, const std::vector<int64_t>& shares) {
        for (const char* name : {"linear", "attention", "embedding", "rms_norm"}) {
            if (schema.name() == std::string("sluice_cpu::") + name) return Call::Kind::prepared;
        }
        const auto reads = [](const c10::Argument& one) { return one.alias_info() && !one.alias_info()->isWrite(); };
        const bool view = std::ranges::all_of(schema.returns(), reads) && std::ranges::all_of(shares, [](int64_t from) { return from >= 0; });
        return view && !shares.empty() ? Call::Kind::view : Call::Kind::immediate;
    }

    void check_register(int64_t from) const {
        TORCH_CHECK(from >= -1 && from < (int64_t)registers_.size(), "register ", from, " has no value yet");
    }

    void add_register(int64_t shares) {
        registers_.push_back({});
        registers_.back().root = shares < 0 ? (int64_t)registers_.size() - 1 : registers_[shares].root;
    }

    static std::vector<int64_t> rows_of(const std::vector<Tensor>& inputs) {
        std::vector<int64_t> rows;
        for (const Tensor& one : inputs) rows.push_back(one.dim() ? one.size(0) : 0);
        return rows;
    }

    void begin_anew() {
        workspace_ = nullptr;
        taken_until_.clear();
        for (Register& one : registers_) {
            one.fixed = false;
            one.value = IValue();
        }
        for (Call& call : calls_) {
            call.settled = false;
            call.prepared = PreparedCall();
        }
    }

    void make(Call& call, Output& output) {
        stack_.clear();
        for (size_t i = 0; i < call.reads.size(); ++i) {
            stack_.push_back(call.reads[i] < 0 ? call.constants[i] : registers_[call.reads[i]].value);
        }
        if (call.kind == Call::Kind::prepared) {
            const sluice::Preparing preparing(call.prepared, output);
            call.op.callBoxed(stack_);
        } else {
            call.op.callBoxed(stack_);
        }
        if (list_of_tensors(call.op.schema())) spread();
        TORCH_CHECK((int64_t)stack_.size() == call.num_writes, call.op.schema().name(), " gave ", stack_.size(), " values");
        for (int64_t i = 0; i < call.num_writes; ++i) registers_[call.first_write + i].value = std::move(stack_[i]);
    }

    void spread() {
        const c10::List<Tensor> list = stack_.back().toTensorList();
        stack_.pop_back();
        for (const Tensor& one : list) stack_.emplace_back(one);
    }

    // A call in the first run: whether the next ones need it.
    void settle(Call& call) {
        bool fixed = std::ranges::all_of(call.reads, [&](int64_t from) { return from < 0 || registers_[from].fixed; });
        // Preparing checks integers, and whoever keeps them may write others.
        for (const IValue& one : call.constants) fixed &= !one.isTensor() || !is_index(one.toTensor());
        if (call.kind == Call::Kind::view) {
            for (int64_t i = 0; i < call.num_writes; ++i) registers_[call.first_write + i].fixed = fixed;
        }
        call.settled = fixed && call.kind != Call::Kind::immediate && registers_[call.first_write].fixed;
    }

    static bool is_index(const Tensor& x) { return x.scalar_type() == at::kLong || x.scalar_type() == at::kInt; }

    // What was prepared of calls [first, last); lets go of what they read. Gives `last`.
    int64_t run_prepared(int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            if (calls_[i].prepared) calls_[i].prepared();
        }
        for (int64_t i = first; i < last; ++i) {
            for (int64_t done : calls_[i].done) {
                if (!registers_[done].fixed) registers_[done].value = IValue();
            }
        }
        return last;
    }

    int64_t num_inputs_;
    int64_t result_ = -1;
    bool finished_ = false;
    std::vector<Register> registers_;
    std::vector<Call> calls_;
    std::atomic_flag running_{};
    std::shared_ptr<Workspace> workspace_;  // that it was first run in; what is fixed lies there
    const sluice::Operators* operators_ = nullptr;  // that it was first run with
    std::vector<int64_t> rows_;                     // of each input of that run
    std::vector<int64_t> taken_until_;      // of each of its blocks, the last call that reads or writes it
    torch::jit::Stack stack_;
};

// Keeps the inputs until it is over: Python's own are let go by a thread that holds Python's lock.
class Running : public torch::CustomClassHolder {
public:
    Running(c10::intrusive_ptr<Program> program, std::vector<Tensor> inputs)
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
    const std::vector<Tensor> inputs_;
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
                       .def("copy", &Program::copy)
                       .def("run", &Program::run);
    library.class_<Running>("Running").def("wait", &Running::wait).def("synchronize", &Running::synchronize);
    // What it gives is what it writes into its inputs and into what it keeps.
    program.def("start", [](const c10::intrusive_ptr<Program>& self, std::vector<Tensor> inputs) {
        return c10::make_intrusive<Running>(self, std::move(inputs));
    });
}
