"""Models in forked processes: they work if the parent was idle, or refuse; nothing ever hangs."""

import subprocess
import sys

import pytest
from conftest import offline_environment
from predictors import predictor_of_shipped_model

# `fork(body)` runs the body in a child and returns what it printed; a child that hangs is killed.
PRELUDE = """
import gc, multiprocessing, os, select, signal, sys, threading, time, traceback
import moerun
from moerun.errors import ForkError

PROMPT = [5, 6, 7]
SECONDS = 20

def kill(child, text):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise SystemExit(f"the child hangs after: {text.decode()}")

def fork(body, leave=os._exit):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        status = 0
        try:
            body()
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        leave(status)
    os.close(writing)
    text, end = b"", time.monotonic() + SECONDS
    while select.select([reading], [], [], max(0, end - time.monotonic()))[0]:
        part = os.read(reading, 65536)
        if not part:
            break
        text += part
    else:
        kill(child, text)
    os.close(reading)
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return text.decode(), status
        time.sleep(0.01)
    kill(child, text)

def check(body, leave=os._exit):
    text, status = fork(body, leave)
    assert status == 0, text
    return text

def text_of(model, **options):
    return list(model.generate(PROMPT, **{"max_new_tokens": 6, "temperature": 0, **options}))

stop = False

def start(call):
    # Repeats it in a thread of its own until `stop`.
    def work():
        while not stop:
            call()
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread

def refused(call):
    try:
        call()
    except ForkError as error:
        return str(error)
    raise AssertionError("not refused")
"""

OPTIONS = [
    {"threads": 1},
    {"threads": 2},
    {"threads": 2, "expert_budget": "25%"},
    {"threads": 1, "expert_budget": "50%", "policy": "predictive"},
]
# A thread that computes without end. Between two of its calls the parent is idle, and its child may
# use the model: then the fork is tried again.
AT_WORK = """
IDLE = 77
thread = start(lambda: model.forward([7] * 1000))
def check_at_work(body, leave=os._exit):
    def whole():
        try:
            model.stats()
        except ForkError:
            return body()
        os._exit(IDLE)
    for _ in range(50):
        time.sleep(0.02)
        text, status = fork(whole, leave)
        if os.waitstatus_to_exitcode(status) != IDLE:
            assert status == 0, text
            return
    raise AssertionError("the parent was never at work")
"""
END_WORK = """
stop = True
thread.join()
assert text_of(model) == text_of(model)
"""


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *arguments],
        capture_output=True,
        text=True,
        env=offline_environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_child_of_an_idle_parent_uses_the_model_as_the_parent_does(options):
    run(f"""
model = moerun.Model.load(**{options})
expected = text_of(model)
logits = model.forward(PROMPT)
def body():
    assert text_of(model) == expected
    assert (model.forward(PROMPT) == logits).all()
    assert model.trace(PROMPT).expert_ids.shape[0] > 0
    model.stats()
    with model.batch(batch_size=2) as batch:
        for _ in range(3):
            batch.add(PROMPT, max_new_tokens=6, temperature=0)
        assert [each.token_ids for each in batch.results()] == [expected] * 3
    # And so does a child of the child.
    check(lambda: text_of(model) == expected or os._exit(3))
    model.close()
for _ in range(2):
    check(body)
assert text_of(model) == expected
""")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_closing_collecting_and_leaving_end_in_a_child(options):
    run(f"""
model = moerun.Model.load(**{options})
text_of(model)
def collect():
    global model
    model = None
    gc.collect()
for leave in (os._exit, sys.exit):
    check(model.close, leave)
    check(lambda: None, leave)
    check(lambda: text_of(model), leave)
    check(collect, leave)
text_of(model)
""")


def test_processes_of_multiprocessing_share_a_model_that_was_loaded_before():
    run("""
model = moerun.Model.load(threads=2)
expected = text_of(model)
def job(_):
    return text_of(model)
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map_async(job, range(4)).get(SECONDS) == [expected] * 4
assert text_of(model) == expected
""")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_child_of_a_parent_at_work_refuses_in_a_sentence_and_ends(options):
    run(f"""
model = moerun.Model.load(**{options})
begun = model.generate(PROMPT, max_new_tokens=3, temperature=0)
parent = os.getpid()
{AT_WORK}
def body():
    for call in (
        lambda: list(model.generate(PROMPT, max_new_tokens=2, temperature=0)),
        lambda: next(begun),
        lambda: model.forward(PROMPT),
        lambda: model.trace(PROMPT),
        lambda: model.batch(batch_size=2),
        model.stats,
        model.cache_events,
        model.residents,
    ):
        message = refused(call)
        assert f"process {{parent}}," in message and f"process {{os.getpid()}}" in message, message
        assert message.count(";") == 1 and "load it in this process" in message, message
        assert "spawn" in message, message
    model.close()
for leave in (os._exit, sys.exit):
    check_at_work(body, leave)
check_at_work(lambda: None, sys.exit)
check_at_work(lambda: len(text_of(moerun.Model.load(threads=2))) == 6 or os._exit(3), sys.exit)
{END_WORK}
""")


def test_no_child_hangs_wherever_the_fork_meets_the_work_of_the_parent():
    run("""
model = moerun.Model.load(threads=2, expert_budget="25%")
expected = text_of(model)
thread = start(lambda: text_of(model, max_new_tokens=50, ignore_eos=True))
def body():
    try:
        assert text_of(model) == expected
    except ForkError:
        pass
    model.close()
    gc.collect()
for i in range(25):
    check(body, sys.exit if i % 5 == 0 else os._exit)
    time.sleep(0.0007 * i)
stop = True
thread.join()
""")


def test_children_that_fork_between_the_reads_of_a_parent_work_or_refuse():
    # The last token of a text leaves reads of the next one under way.
    run("""
model = moerun.Model.load(threads=1, expert_budget="25%", prefetch=True)
expected = text_of(model)
for _ in range(20):
    assert text_of(model) == expected
    check(lambda: text_of(model) == expected or os._exit(3))
""")


def test_a_generation_that_began_before_a_fork_goes_on_in_both_processes():
    run("""
model = moerun.Model.load(threads=2)
expected = text_of(model)
begun = model.generate(PROMPT, max_new_tokens=6, temperature=0)
first = [next(begun), next(begun)]
def body():
    assert first + list(begun) == expected
check(body)
assert first + list(begun) == expected
""")


def test_a_signal_handler_may_fork_in_the_middle_of_a_step():
    run("""
model = moerun.Model.load(threads=2, expert_budget="25%")
expected = text_of(model)
child = None
def handler(*_):
    global child
    child = os.fork()
signal.signal(signal.SIGALRM, handler)
signal.siginterrupt(signal.SIGALRM, False)
BETWEEN = 7  # the exit code of a child whose parent was between two calls
for _ in range(50):
    child, is_refused = None, False
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        while child is None:
            model.trace(PROMPT, generate=600)  # long: signals are looked at every 100 ms
    except ForkError as error:
        assert child == 0 and "in the middle of a call" in str(error)
        is_refused = True
    if child == 0:
        if is_refused:
            refused(lambda: text_of(model))
            model.close()
        sys.exit(0 if is_refused else BETWEEN)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    if code != BETWEEN:
        break
assert code == 0
assert text_of(model) == expected
""")


def test_a_fork_while_a_model_is_loaded_leaves_the_child_without_it():
    run("""
children = []
def progress(done, total):
    if not children:
        children.append(os.fork())
try:
    model = moerun.Model.load(threads=2, progress=progress)
except ForkError as error:
    assert children == [0] and "in the middle of a call" in str(error)
    sys.exit(0)
assert children[0] != 0 and os.waitpid(children[0], 0)[1] == 0
assert len(text_of(model)) == 6
""")


def test_a_batch_goes_on_in_a_child_between_steps_and_refuses_in_the_middle_of_one():
    run("""
model = moerun.Model.load(threads=2)
expected = text_of(model)
batch = model.batch(batch_size=2)
for _ in range(3):
    batch.add(PROMPT, max_new_tokens=6, temperature=0)
batch.step()
check(lambda: [each.token_ids for each in batch.results()] == [expected] * 3 or os._exit(3))
for _ in range(3):
    batch.add(PROMPT, max_new_tokens=900, temperature=0, ignore_eos=True)
thread = threading.Thread(target=batch.results, daemon=True)
thread.start()
refusals = 0
def body():
    # Its lock is the other thread's, always.
    try:
        batch.add(PROMPT, temperature=0)
    except ForkError:
        refused(batch.step)
        refused(lambda: batch.cancel(0))
        print("refused")
    batch.close()
    model.close()
for leave in (os._exit, sys.exit) * 10:
    assert thread.is_alive()
    refusals += check(body, leave).count("refused")
assert refusals
for sequence in range(6):
    batch.cancel(sequence)
thread.join()
""")


def test_a_predictor_works_in_a_child_of_an_idle_parent_and_refuses_in_others(tmp_path):
    path = predictor_of_shipped_model(tmp_path / "paths.safetensors")
    run(
        """
from moerun.predictor import PathPredictor
model = moerun.Model.load(threads=1, expert_budget="25%", policy="predictive")
predictor = PathPredictor.open(sys.argv[1], threads=2)
expected = predictor.predict(list(range(40)))
state = predictor.state()
def body():
    assert (predictor.predict(list(range(40))) == expected).all()
    predictor.advance([state], [[1, 2]])
check(body)
# A batch predicts on a thread of its own.
with model.batch(batch_size=2, predictor=sys.argv[1]) as batch:
    for _ in range(4):
        batch.add(PROMPT, max_new_tokens=6, temperature=0)
    for _ in range(3):
        batch.step()
    check(lambda: len(batch.results()) == 4 or os._exit(3), sys.exit)
    assert len(batch.results()) == 4
thread = start(lambda: predictor.predict([1, 2, 3] * 3000))
refusals = 0
def body():
    try:
        predictor.predict([1])
    except ForkError as error:
        assert "the predictor was loaded in process" in str(error)
        refused(lambda: predictor.advance([state], [[1, 2]]))
        refused(state.clear)
        print("refused")
for leave in (os._exit, sys.exit) * 5:
    refusals += check(body, leave).count("refused")
assert refusals
stop = True
thread.join()
""",
        str(path),
    )


def test_the_c_interface_names_the_refusal():
    run("""
from moerun import capi
path = moerun.Model.load(threads=1).path
model = capi.Model(path, threads=2)
expected = model.forward(PROMPT)
check(lambda: (model.forward(PROMPT) == expected).all() or os._exit(3), sys.exit)
thread = start(lambda: model.forward(PROMPT * 300))
refusals = 0
def body():
    try:
        model.forward(PROMPT)
    except ForkError as error:
        assert "load it in this process" in str(error)
        print("refused")
    model.close()
for leave in (os._exit, sys.exit) * 5:
    refusals += check(body, leave).count("refused")
assert refusals
stop = True
thread.join()
""")
