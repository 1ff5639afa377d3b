"""The benchmark: its quick form runs, a wrong answer is refused, and its arithmetic is right."""
import contextlib
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import reference
from workbench import needs_compiler

import edgeattn
from benchmarks import (
    cases,
    contenders,
    cuda,
    cuda_host,
    decode,
    functional,
    limits,
    machine,
    measure,
    pages,
    rounding,
    start,
    targets,
    timing,
)
from benchmarks.__main__ import main
from benchmarks.contenders import OURS, Contender, WrongAnswerError
from benchmarks.functional import Shape
from benchmarks.limits_elsewhere import Limits
from benchmarks.problem import GRID, QUICK, Point, Problem
from benchmarks.report import as_text
from benchmarks.timing import FEWEST_ROUNDS, interleave, median_ratio

SMALL = Point(16, 4, 12)
OUR_NAMES = ["edgeattn float32", "edgeattn int8", "edgeattn dynamic", "numpy"]


@pytest.fixture(scope="module")
def problem():
    return Problem(SMALL)


@pytest.mark.parametrize("working, pauses", [
    (0, FEWEST_ROUNDS), (3, FEWEST_ROUNDS + 3), (10**6, FEWEST_ROUNDS * timing.LONGEST_SETTLE / timing.SETTLE)])
def test_a_block_on_several_threads_begins_when_no_thread_works_any_more(working, pauses, monkeypatch):
    wall = processor = slept = 0.0

    def sleep(seconds):
        nonlocal wall, processor, slept
        wall, slept = wall + seconds, slept + 1
        processor += seconds if slept <= working else 0  # somebody else works for so many pauses

    monkeypatch.setattr(timing, "time", SimpleNamespace(
        sleep=sleep, perf_counter=lambda: wall, process_time=lambda: processor))
    interleave({"one": lambda: None}, seconds=0, threads=2)
    assert slept == pytest.approx(pauses, rel=0.01)


def test_grid():
    assert len(GRID) == len(set(GRID)) == 45
    assert set(QUICK) <= set(GRID)
    assert Point(128, 4, 128).operations == 8 * 128 * 128**2 + 4 * 128**2 * 128


@pytest.mark.parametrize("text, what", [("64/4", "E/H/L"), ("64/x/32", "E/H/L"), ("64/12/32", "multiple"),
                                        ("0/1/2", "positive")])
def test_point_refuses(text, what):
    with pytest.raises(ValueError, match=what):
        Point.parse(text)


def test_quick_run_writes_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.__main__.QUICK", (SMALL, Point(32, 4, 32)))
    path = tmp_path / "found.json"
    assert main(["--quick", "--seconds", "0.05", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [r["case"] for r in found["records"]] == ["16/4/12", "32/4/32"]
    for r in found["records"]:
        assert not r["refused"]
        assert set(r["times"]) == {*OUR_NAMES, *r["bounds"]}
        assert {"float32 limit", "int8 limit"} <= set(r["bounds"])
        rounds = {len(times) for times in r["times"].values()}
        assert len(rounds) == 1 and rounds.pop() >= FEWEST_ROUNDS
        assert all(0 < time < 10 for times in r["times"].values() for time in times)
    assert found["machine"]["versions"]["numpy"] == np.__version__
    assert found["machine"]["instruction_set"] and len(found["machine"]["load"]) == 3
    printed = capsys.readouterr().out
    assert "edgeattn float32, layer, 1 thread" in printed and "float32 limit" in printed
    # a file is reported as the run was
    assert main(["--from-json", str(path)]) == 0
    assert "edgeattn dynamic, layer, 1 thread" in capsys.readouterr().out


def spoiled(row: Contender, spoil) -> Contender:
    def build(problem, threads):
        call, read = row.build(problem, threads)
        return call, lambda: spoil(read())
    return dataclasses.replace(row, build=build)


def one_off(answer):
    answer = np.array(answer)
    answer.flat[7] += np.asarray(1 if answer.dtype == np.int8 else 1e-4, answer.dtype)
    return answer


SPOILT = {"edgeattn float32": (one_off, "error"), "edgeattn int8": (one_off, "1 of 192 bytes differ"),
          "edgeattn dynamic": (lambda answer: answer[:, ::-1], "cosine"), "numpy": (lambda answer: answer * np.nan, "error")}


@pytest.mark.parametrize("row", OURS, ids=lambda row: row.name)
def test_wrong_answer_is_refused(row, problem):
    row.ready(problem, 1)
    spoil, complaint = SPOILT[row.name]
    with pytest.raises(WrongAnswerError, match=f"{row.name} at 16/4/12: .*{complaint}.*not timed"):
        spoiled(row, spoil).ready(problem, 1)


def test_wrong_answer_is_not_timed_and_fails_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(contenders, "OURS", (spoiled(OURS[0], one_off), *OURS[1:]))
    path = tmp_path / "found.json"
    arguments = ["--points", str(SMALL), "--sections", "layer", "--seconds", "0.05", "--threads", "1", "--json",
                 str(path)]
    assert main(arguments) == 1
    record, = json.loads(path.read_text())["records"]
    assert list(record["refused"]) == ["edgeattn float32"]
    assert "edgeattn float32" not in record["times"] and "edgeattn int8" in record["times"]
    assert "REFUSED: edgeattn float32 at 16/4/12" in capsys.readouterr().out


@pytest.mark.parametrize("module, problem", [
    (decode, decode.DecodeProblem(decode.Step(S=70, Hkv=2, H=4, D=16))),
    (functional, functional.AttentionProblem(functional.Shape(2, 33, 16))),
    (cases, cases.CaseProblem(next(point for point in cases.CASES if str(point) == "everything")))],
    ids=["decode", "functional", "cases"])
def test_other_sections_check_too(module, problem):
    for row in module.OURS:
        row.ready(problem, 1)
        with pytest.raises(WrongAnswerError, match=row.name):
            spoiled(row, lambda answer: -answer).ready(problem, 1)


def test_bytes_are_held_to_the_rules_and_float_to_the_error_of_plain_numpy(problem):
    exact = problem.exact
    assert contenders.check_float(problem, exact) is None
    assert "error" in contenders.check_float(problem, exact + 5 * problem.plain_error + 1e-6)
    assert "int64" in contenders.check_bytes(problem, problem.static_bytes.astype(np.int64))
    assert "shape" in contenders.check_cosine(problem, exact[0])
    assert contenders.check_usual(problem, problem.usual.run_int8(problem.codes)) is None


@pytest.mark.parametrize("name", ["litert int8", "litert int8 usual", "litert float32", "litert dynamic"])
def test_litert_contenders_pass_their_checks(name, problem):
    row, = (row for row in contenders.PEERS if row.name == name)
    if row.why_not():
        pytest.skip(f"{row.why_not()} (pip install 'edgeattn[tflite]')")
    row.ready(problem, 1)


def test_interleave_calls_all_in_every_round():
    calls = {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1

    times = interleave({name: lambda name=name: count(name) for name in calls}, seconds=0)
    assert len(times["a"]) == len(times["b"]) == FEWEST_ROUNDS
    assert min(calls.values()) > FEWEST_ROUNDS


def test_weights_are_in_the_caches_before_a_block_and_cold_calls_are_told_apart(monkeypatch):
    clock, last, calls = 0.0, None, 0

    def call(name):
        nonlocal clock, last, calls
        calls = calls + 1 if last == name else 1
        last, clock = name, clock + (8e-3 if calls == 1 else 4e-3 if calls < 4 else 2e-3)  # the others' weights go by and by

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock, process_time=lambda: clock))
    cold = {}
    times = interleave({name: lambda name=name: call(name) for name in "ab"}, seconds=0, warm=16e-3, cold=cold)
    assert times["a"] == times["b"] == pytest.approx([2e-3] * FEWEST_ROUNDS)
    assert max(cold["a"][1:]) == pytest.approx(8e-3) and len(cold["a"]) == FEWEST_ROUNDS


def test_ratio_is_of_rounds_not_of_medians():
    # the machine slows down threefold in two rounds of three, for both alike
    assert median_ratio([2.0, 6.0, 6.0], [1.0, 3.0, 3.0]) == 2.0


def made_up():
    """One layer, with peers, of known times."""
    times = {"edgeattn float32": 10.0, "edgeattn int8": 4.0, "edgeattn dynamic": 6.0, "litert float32": 20.0,
             "litert int8": 8.0, "litert int8 usual": 80.0, "onnxruntime float32": 9.0, "float32 limit": 1.0,
             "int8 limit": 1.0}
    point = Point(256, 4, 128)
    record = {"section": "layer", "threads": 1, "case": str(point), "operations": point.operations,
              "bounds": {"float32 limit": point.operations / 8, "int8 limit": point.operations / 2}, "refused": {},
              "times": {name: [time * 1e-6] * 3 for name, time in times.items()}}
    return {"records": [record], "machine": {"processor": "p", "instruction_set": "i", "date": "2000-01-01", "versions": {}}}


def test_targets():
    rows = {row.text: row for row in targets.outcomes(made_up())}
    value = {text: next(iter(row.cases.values())) for text, row in rows.items()}
    assert value["float32: as fast as any float32 peer"] == pytest.approx(0.9)
    assert value["float32: 70 % of its limit, from 128/4/128 up"] == pytest.approx(0.8 / 0.7)
    assert value["int8: 3 times as fast as LiteRT's best int8"] == pytest.approx(2 / 3)
    assert value["int8: 10 times as fast as the usual int8 file"] == pytest.approx(2)
    assert value["int8: 50 % of its limit, from 256/4/128 up"] == pytest.approx(1)
    assert value["dynamic: as fast as any peer at any precision"] == pytest.approx(8 / 6)
    row = rows["float32: as fast as any float32 peer"]
    assert (row.met, row.reached, row.worst, row.figure) == (0, False, "256/4/128", "0.90 x")
    row = rows["int8: 3 times as fast as LiteRT's best int8"]
    assert (row.reached, row.figure) == (False, "2.00 x")
    assert rows["float32: 70 % of its limit, from 128/4/128 up"].figure == "80%"
    row = rows["float32: at least 0.9 times as fast as its peers"]
    assert (row.reached, row.figure) == (True, "0.90 x")
    assert value["int8: twice LiteRT's best int8 where L >= 64"] == pytest.approx(1)
    assert "int8: ahead of both where L = 32" not in rows


def test_costs_are_shown_in_their_unit_and_a_part_of_the_cases_can_be_enough():
    found = {"records": [], "overhead": {"case": "64/4/32", "seconds": {"float32": 4e-6, "int8": 8e-6}}}
    row, = targets.outcomes(found)
    assert (row.met, row.reached, row.worst, row.figure) == (1, False, "int8", "8.00 us")
    assert dataclasses.replace(row, part=0.5).reached


def test_causal_targets_count_what_a_mask_leaves_to_do():
    shape, layer = Shape(12, 512), Point(384, 12, 512)
    assert shape.causal_operations / shape.operations == pytest.approx(0.5, abs=0.001)
    part = layer.causal_operations / layer.operations  # 60 % of a layer's operations are projections
    assert part == pytest.approx(0.6 + 0.4 / 2, abs=0.001)
    names = ("edgeattn float32", "edgeattn int8", "edgeattn dynamic")
    records = [{"section": f"causal {what}", "threads": 1, "case": str(case), "operations": case.operations,
                "causal_operations": case.causal_operations, "bounds": {}, "refused": {},
                "times": {name + mask: [1.0 - 0.4 * bool(mask)] * 3 for name in names for mask in ("", " causal")}}
               for what, case in (("attention", shape), ("layer", layer))]
    value = {row.text: row.cases for row in targets.outcomes({"records": records})}
    assert value["causal attention: 60 % of the time of full"] == {"12/512/64": pytest.approx(1)}
    for kind in ("float32", "int8", "dynamic"):
        assert value[f"causal {kind} layer: its operations' part of full (+ 10 %)"] == {
            "384/12/512": pytest.approx(1.1 * part / 0.6)}
    assert "80%" in as_text({"machine": machine.describe() | {"seconds": 1.0}, "records": records})


def test_tables_and_marks_of_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    page = tmp_path / "docs" / "performance.md"
    page.parent.mkdir()
    page.write_text("before\n")
    with pytest.raises(ValueError, match="docs/performance.md must hold one line"):
        pages.write_table(made_up())
    page.write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    overhead = {"case": "64/4/32", "seconds": {}, "steps": {"float32": 13.21e-6, "static": 2e-5}}
    pages.write_table({**made_up(), "overhead": overhead})
    text = page.read_text()
    assert ("\nOne token through a layer of E = 64, H = 4, with a cache that holds 32: float32 13.2 us, static 20.0 us.\n"
            in text)
    assert text.startswith("before\n") and text.endswith(f"{pages.END}\nafter\n") and "\nold\n" not in text
    assert "| 256 / 4 / 128 | 10 | 0.9 x onnxruntime float32 | 4 | 2.0 x | 20.0 x | 6 | 1.3 x litert int8 |" in text


def test_plots(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the plots need matplotlib (pip install 'edgeattn[examples]')")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    found = made_up()
    step = {**found["records"][0], "section": "decode", "case": "8/2/64/256"}
    written = pages.write_plots({**found, "records": [*found["records"], step]})
    assert [path.name for path in written] == ["speed.png", "decode.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


@pytest.mark.parametrize("arguments, what", [
    (["--points", "64/5/32"], "multiple"), (["--threads", "0"], "at least 1"),
    (["--quick", "--points", "64/4/32"], "leave out"), (["--sections", "nothing"], "invalid choice")])
def test_arguments_are_refused(arguments, what, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert what in capsys.readouterr().err


def test_sections_run_alone(tmp_path, capsys):
    assert set(measure.SECTIONS) == {"layer", "functional", "cases", "decode", "causal", "long", "overhead",
                                     "process"}
    path = tmp_path / "found.json"
    assert main(["--sections", "overhead", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "a call beside its kernel" in printed and "one token through a layer of" in printed
    steps = json.loads(path.read_text())["overhead"]["steps"]
    assert list(steps) == ["float32", "dynamic", "static", "static, codes"] and min(steps.values()) > 0


def test_cases_are_those_of_the_tests_that_compute_something(monkeypatch):
    names = {str(point) for point in cases.CASES}
    assert {"length-1", "everything", "padding-causal", "long"} <= names
    assert not {name for name in names if name.startswith("empty")}
    problem = cases.CaseProblem(next(point for point in cases.CASES if str(point) == "lengths"))
    for row in measure.available([*cases.OURS, *cases.PEERS]):
        row.ready(problem, 1)


def test_what_a_library_cannot_say_is_left_out_of_it():
    def build(problem, threads):
        raise contenders.CannotSayError("no words")

    rows = [cases.OURS[0], dataclasses.replace(cases.OURS[1], build=build)]
    found = measure.record("cases", cases.CaseProblem(cases.CASES[0]), rows, 1, 0, {})
    assert (list(found["times"]), found["refused"]) == (["edgeattn float32"], {})


def test_decode_stands_beside_reads_of_as_many_bytes():
    problem = decode.DecodeProblem(decode.Step(S=70, Hkv=2, H=4, D=16))
    bounds = limits.read_limits(problem.caches(), problem.point.operations)
    found = measure.record("decode", problem, decode.OURS, 1, 0, bounds)
    assert set(found["bounds"]) == {"float32 read", "int8 read"} <= set(found["times"])
    found = {"machine": machine.describe() | {"seconds": 1.0}, "records": [found], "reads": {"1": {"L2 (1 MiB)": 5e9}}}
    assert "reads of L2 (1 MiB) 5 GB/s" in as_text(found) and "of read" in as_text(found)
    assert "register loops" not in as_text(found)


def test_every_cache_and_the_memory_are_read_from(monkeypatch):
    sizes = machine.cache_sizes()
    assert sizes and all(size > 0 for size in sizes.values())
    monkeypatch.setattr(limits, "cache_sizes", lambda: {"memory": 1 << 20})
    (name, rate), = limits.read_rates(1).items()
    assert name == "memory (1 MiB)" and 1e8 < rate < 1e13


def test_limits_are_measured_in_a_process_of_their_own():
    needs_compiler()
    with Limits(1, {"read": 1 << 20}) as found:
        assert {"float32 limit", "int8 limit", "read"} <= set(found.operations)
        times = interleave({"int8": found.call("int8 limit"), "read": found.call("read")}, seconds=0, warm=1e-3)
    assert len(times["read"]) == FEWEST_ROUNDS and 1e-6 < min(times["read"]) < 1e-2
    assert 1e9 < found.operations["int8 limit"] / min(times["int8"]) < 1e13


def test_start_compares_forms_that_give_the_same_bytes(tmp_path, monkeypatch):
    pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert: pip install 'edgeattn[tflite]'")
    needs_compiler()
    start.make_files(tmp_path)
    found = start.measure(tmp_path, rounds=1)
    assert list(found) == start.forms() and {"NumPy alone", "bundle, static int8", "LiteRT, static int8"} <= set(found)
    assert found["bundle, static int8"]["mib"] < found["compiled when called"]["mib"]
    litert = start.FORMS["LiteRT, static int8"]
    monkeypatch.setattr(start, "forms", lambda _: ["LiteRT, static int8"])
    for work, words in (("y = numpy.zeros(3)", "failed: ValueError"), ("y = numpy.load(data)", "gave a different result"),
                        ("raise ValueError('no')", "failed: ValueError: no")):
        monkeypatch.setitem(start.FORMS, "LiteRT, static int8", litert._replace(work=work))
        with pytest.raises(RuntimeError, match=f"LiteRT, static int8 {words}"):
            start.measure(tmp_path, rounds=1)


def test_cuda_names_its_contenders_and_why_it_does_not_run(capsys, monkeypatch):
    monkeypatch.setattr(cuda, "missing", lambda: "no GPU to run on: none is there")
    assert cuda.main([]) == 1
    said = capsys.readouterr()
    assert all(contender.name in said.out for contender in cuda.CONTENDERS)
    assert "bench-cuda: not run, no GPU to run on: none is there." in said.err


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["torch float32 math", "torch int8 _int_mm"])
def test_cuda_contenders_attend(name, causal):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'edgeattn[peers]'")
    (contender,) = (contender for contender in cuda.CONTENDERS if contender.name == name)
    q, k, v = (torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    want = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal).numpy()
    with contender.around(torch):
        error = rounding.off(contender.make(torch, q, k, v, causal)().double().numpy(), want)
    assert error <= rounding.allowed(*(x.numpy() for x in (q, k, v)), want, causal, contender.precision)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("precision", rounding.PRECISIONS)
def test_what_is_allowed_on_a_gpu_is_what_rounding_gives(device, precision, causal):
    """Our kernels keep it, in the emulator or on the GPU, and no kernel of a coarser precision does."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 70, 32), np.float32) for _ in range(3))
    want = reference.attention(q, k, v, np.tri(70, dtype=bool) if causal else None)[0]
    allowed = rounding.allowed(q, k, v, want, causal, precision)
    given = [x.astype(np.float16) for x in (q, k, v)] if precision == "float16" else [q, k, v]
    ours = edgeattn.scaled_dot_product_attention(*map(device.array, given), is_causal=causal, precision=precision)
    assert rounding.off(ours.numpy(), want) <= allowed
    coarser = {"float32": "tf32", "tf32": "int8", "float16": "int8"}.get(precision)
    if coarser:
        assert allowed < rounding.allowed(q, k, v, want, causal, coarser) / 4


def test_a_contenders_context_is_not_timed():
    entered = []

    @contextlib.contextmanager
    def around(torch):
        entered.append("in")
        yield
        entered.append("out")

    event = SimpleNamespace(record=lambda: entered.append("mark"), elapsed_time=lambda other: 1.0)
    torch = SimpleNamespace(cuda=SimpleNamespace(Event=lambda enable_timing: event, synchronize=lambda: None))
    cuda.timed(torch, lambda: entered.append("call"), around)
    assert entered == ["in", "mark", *["call"] * cuda.CALLS, "mark", "out"]


def test_calls_on_an_idle_gpu_are_the_same_launches_when_repeated(monkeypatch):
    gpu, launches = cuda_host._IdleDriver(), []
    monkeypatch.setattr(cuda_host.driver, "_current", gpu)
    monkeypatch.setattr(cuda_host._Idle, "cuLaunchKernel", lambda _, function, *sizes: launches.append(sizes[:7]) or (0,))
    for name, call in cuda_host.calls().items():
        launches.clear()
        call()
        first = launches.copy()
        for _ in range(2):
            launches.clear()
            call()
            assert launches == first != [], name
