"""Each verb does what its help says, as a user calls it."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import sala as package
from sala.cli.inspect import layer_strip, ranges
from sala.cli.progress import Display, counting, duration
from sala.errors import loading


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("def area(radius):\n    return 3.14 * radius ** 2\n" * 4)
    return path


def test_help_names_every_verb(sala):
    outcome = sala("--help")
    assert outcome.code == 0
    assert all(verb in outcome.out for verb in ("generate", "inspect", "convert", "train", "select", "demo"))


def test_the_version_is_the_package_s(sala):
    assert sala("--version").out == f"sala {package.__version__}\n"


def test_the_answer_alone_goes_to_standard_output(sala, hybrid, book):
    arguments = ("generate", "--model", hybrid, "--file", book, "--prompt", "and", "-n", "8")
    plain, counted = sala(*arguments), sala(*arguments, "--stats", "--chunk", "16")
    assert plain.code == 0
    assert plain.err == ""
    assert counted.out == plain.out
    for fact in ("tokens read", "prefill", "time to first token", "decoding", "cache", "peak memory"):
        assert fact in counted.err


def test_a_seed_repeats_an_answer(sala, hybrid):
    def answer(seed):
        return sala(
            *("generate", "--model", hybrid, "--prompt", "x", "-n", "12", "--temperature", "0.9", "--top-p", "0.9"),
            *("--top-k", "50", "--repetition-penalty", "1.1", "--seed", seed),
        ).out

    assert answer(1) == answer(1) != answer(2)


def test_standard_input_is_a_file_called_dash(sala, hybrid, book, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(book.read_bytes())))
    typed = sala("generate", "--model", hybrid, "--file", "-", "-n", "8")
    assert typed.out == sala("generate", "--model", hybrid, "--file", book, "-n", "8").out


def test_files_passed_over_are_counted(sala, hybrid, book):
    (book.parent / "blob").write_bytes(b"\0")
    assert "passed over 1 " in sala("generate", "--model", hybrid, "--file", book.parent, "-n", "1").err


def test_special_tokens_in_what_is_read_are_text_unless_asked_for(sala, hybrid):
    run = ("generate", "--model", hybrid, "--prompt", "a<|end|>b", "-n", "1", "--stats")
    line = "1 special token spelled out in the text was read as text; --special-tokens makes them special"
    outcome = sala(*run)
    assert line in " ".join(outcome.err.split())
    # the start token, one for each of the two letters, and one special
    asked = sala(*run, "--special-tokens").err
    assert "spelled out" not in asked
    assert re.search(r"tokens read +4", asked)


def test_links_that_lead_out_of_a_folder_are_counted(sala, hybrid, book):
    (book.parent / "link").symlink_to(hybrid / "config.json")
    err = sala("generate", "--model", hybrid, "--file", book.parent, "-n", "1", "--stats").err
    assert "passed over 1 links that lead out of their folder" in err


def test_inspect_shows_and_prints_the_same_facts(sala, hybrid):
    shown, printed = sala("inspect", hybrid), sala("inspect", hybrid, "--json")
    facts = json.loads(printed.out)
    assert facts["mixer_types"] == ["minicpm4", "lightning-attn", "lightning-attn", "attention"]
    assert f"{facts['total_parameters']:,} parameters" in shown.out
    for reason in facts["sglang"]:
        assert reason in shown.out
    for name, reason in facts["backends"].values():
        assert name in shown.out
        assert reason in shown.out


def test_a_folder_with_brackets_is_shown_as_it_is(sala, hybrid, tmp_path):
    folder = tmp_path / "[b] [" / "x]"
    folder.parent.mkdir()
    folder.symlink_to(hybrid)
    assert sala("inspect", folder).out.startswith(f"{folder}  ")
    assert sala("plan", "--model", folder, "--memory", "1GiB").out.startswith(f"{folder}, ")


def test_fetch_lists_what_there_is(sala, monkeypatch, tmp_path):
    monkeypatch.setenv("SALA_CACHE", str(tmp_path))
    outcome = sala("fetch")
    assert outcome.code == 0 and "smollm2-135m-instruct" in outcome.out and " no " in outcome.out
    outcome = sala("generate", "--model", "smollm2-135m-instruct", "--prompt", "hi")
    assert outcome.code == 2 and "expected `sala fetch smollm2-135m-instruct` first" in outcome.err


def test_a_prompt_beyond_the_trained_positions_gets_one_line(sala, tmp_path, teacher, hybrid, caplog):
    short = shutil.copytree(teacher, tmp_path / "short")
    fields = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": 8}))
    prompt = ("--prompt", "def area(radius): return 3.14 * radius ** 2", "-n", "1")
    for model, told in ((short, 1), (teacher, 0), (hybrid, 0)):
        caplog.clear()
        assert sala("generate", "--model", model, *prompt).code == 0
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == told
        assert all("more than the 8 positions that the model was trained on" in line for line in warnings)


def test_a_selection_without_evidence_says_so(sala, tmp_path):
    rows = [{"layer": layer, "recall": 0.0, "language": 0.1 * layer} for layer in range(4)]
    (tmp_path / "selection.json").write_text(json.dumps({"layers": rows}))
    outcome = sala("select", "--scores", tmp_path / "selection.json", "--keep", "1")
    assert outcome.code == 0 and outcome.out.splitlines()[-1] == "3"
    assert outcome.err.startswith("1 of 4 equal layers are kept, an arbitrary choice: recall is 0 whichever layer is")


def test_a_teacher_of_another_architecture_is_not_sglangs_minicpm(sala, tmp_path, teacher):
    mine = shutil.copytree(teacher, tmp_path / "llama")
    config = LlamaConfig(
        vocab_size=1159,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(mine)
    outcome = sala("inspect", mine)
    assert outcome.code == 0 and "can load it" not in outcome.out
    assert "config.json says 'llama', for another model of SGLang" in outcome.out


def test_select_prints_the_kept_layers_last(sala, tmp_path):
    recall = (0.9, 0.1, 0.8, 0.2)
    rows = [{"layer": i, "retrieval": {"avg": r}, "commonsense": {"avg": 0.5}} for i, r in enumerate(recall)]
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"models": {"[/m]": {"layers": rows}}}))
    shown = sala("select", "--scores", path, "--model", "[/m]", "--keep", "2").out.splitlines()
    assert (shown[0].rstrip(), shown[-1]) == ("[/m]: 2 of 4 layers stay attention", "1 3")
    kept = sala("select", "--scores", path, "--model", "[/m]", "--keep", "3", "--first-last").out.splitlines()[-1]
    assert kept == "0 1 3"
    outcome = sala("select", "--scores", path, "--model", "[/m]", "--keep", "2", "--plot", tmp_path / "layers.png")
    assert outcome.out.splitlines()[-1] == "1 3"
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_layers_are_drawn_and_counted():
    assert layer_strip(("minicpm4", "lightning-attn", "attention")).plain == "0 ▓░█ 2"
    assert ranges([0, 2, 3, 4, 9]) == "0, 2-4, 9"


def step(number, **changes):
    fields = {"stage": "align", "step": number, "steps": 3, "loss": 0.5, "tokens_per_s": 1234.0, "seconds_left": 65.0}
    more = {"learning_rate": 3e-4, "gradient_norm": 0.4321, "mfu": None, "memory_bytes": 0, "validation_loss": None}
    return SimpleNamespace(**{**fields, **more, **changes})


MEASUREMENT = {"loss": None, "learning_rate": None, "gradient_norm": None, "tokens_per_s": None}


def lines(console_file):
    return console_file.getvalue().splitlines()


def test_a_log_gets_the_first_and_the_last_step_of_a_stage():
    file = io.StringIO()
    with Display(Console(file=file, width=200)) as display:
        display.say("[set] is no markup")
        for number in (1, 2, 3):
            display.observe(step(number))
        display.observe(step(3, stage="long", mfu=0.4321, memory_bytes=3 * 2**30))
        display.observe(step(1, stage="needle", **MEASUREMENT))
    assert lines(file) == [
        "[set] is no markup",
        "align: step 1 of 3, loss 0.5000, lr 3.0e-04, grad norm 0.432, 1,234 tokens/s, 1 min 5 s left",
        "align: step 3 of 3, loss 0.5000, lr 3.0e-04, grad norm 0.432, 1,234 tokens/s",
        "long: step 3 of 3, loss 0.5000, lr 3.0e-04, grad norm 0.432, 1,234 tokens/s, MFU 43.2%, memory 3.0 GiB",
        "needle: step 1 of 3, 1 min 5 s left",
    ]


def test_a_terminal_sees_what_a_step_says_and_keeps_each_stage_s_loss():
    file = io.StringIO()
    with Display(Console(file=file, width=100, force_terminal=True)) as display:
        display.observe(step(2, mfu=0.4321, memory_bytes=3 * 2**30))
        display._bars.refresh()
        working = file.getvalue()
        display.observe(step(1, stage="teacher", **MEASUREMENT), phase="Measure")
        display.observe(step(1, stage="[/x] [long]"))
    left = "".join(lines(file)[-4:])
    assert "[/x] [long]" in left
    for fact in ("align", "2/3", "loss 0.5000", "1 min 5 s left"):
        assert fact in working
        assert fact in left
    below = "lr 3.0e-04, grad norm 0.432, 1,234 tokens/s, MFU 43.2%, memory 3.0 GiB"
    assert below in working
    assert "Measure" in left
    assert below not in left


def test_the_longest_step_fits_a_hundred_columns():
    file = io.StringIO()
    with Display(Console(file=file, width=100, force_terminal=True, color_system=None)) as display:
        display.observe(
            step(
                127_999,
                steps=128_000,
                stage="short-decay",
                gradient_norm=1234.5,
                tokens_per_s=1_234_567.0,
                mfu=0.4321,
                memory_bytes=71 * 2**30,
                validation_loss=None,
                seconds_left=80_000.0,
            )
        )
        display._bars.refresh()
        row, below = lines(file)[-2:]
    assert "128000" in row and "22 h 13 min left" in row
    assert below.strip() == "lr 3.0e-04, grad norm 1.23e+03, 1,234,567 tokens/s, MFU 43.2%, memory 71.0 GiB"


def test_a_bar_is_gone_when_all_is_done():
    file = io.StringIO()
    console = Console(file=file, width=120, force_terminal=True)
    with counting(console, "reading", 10, "tokens") as read:
        read(4)
        read(6)
        length = len(file.getvalue())
        console.print("answer")
    assert file.getvalue()[length:] == "answer\n"


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "42 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_an_interrupted_run_exits_with_130_and_other_errors_keep_their_traceback(sala, hybrid, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sala.engine.generate", interrupted)
    outcome = sala("generate", "--model", hybrid, "--prompt", "x")
    assert (outcome.code, outcome.err) == (130, "sala: interrupted\n")

    def broken(*arguments, **options):
        raise RuntimeError("ours")

    monkeypatch.setattr("sala.engine.generate", broken)
    with pytest.raises(RuntimeError, match="ours"):
        sala("generate", "--model", hybrid, "--prompt", "x")


@pytest.mark.parametrize("module", ["transformers", "typer"])
def test_ctrl_c_while_it_loads_is_one_line(module):
    # as if it came with the first name that is taken from the module, and what is heavy were there
    program = (
        "import runpy, sys, types, unittest.mock\n"
        "def interrupt(name): raise KeyboardInterrupt\n"
        "sys.modules |= dict.fromkeys(('transformers', 'sala.model', 'sala.model.families'), unittest.mock.MagicMock())\n"
        f"sys.modules[{module!r}] = types.ModuleType({module!r})\n"
        f"sys.modules[{module!r}].__getattr__ = interrupt\n"
        "runpy.run_module('sala.cli', run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    # a shell says 130
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "sala: interrupted\n")


def test_another_error_while_it_loads_is_python_s(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("sys.excepthook", lambda *error: seen.append(error))
    python_s = sys.excepthook
    # a program may go on without what cannot be imported
    with pytest.raises(ImportError), loading():
        raise ImportError("theirs")
    assert sys.excepthook is python_s
    with pytest.raises(KeyboardInterrupt), loading():
        raise KeyboardInterrupt
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt("theirs"), None)
    assert [kind for kind, *_ in seen] == [KeyboardInterrupt] and not capsys.readouterr().err
    assert sys.excepthook is python_s


def test_verbs_load_nothing_heavy_before_they_run():
    # the package itself registers the model with transformers; the command line adds nothing to that
    program = "import sys, sala; before = set(sys.modules); import sala.cli; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {name for name in loaded if name.startswith(("torch", "transformers", "matplotlib"))}
    assert not {name for name in loaded if name.startswith("sala.") and not name.startswith("sala.cli")}


def test_convert_makes_a_hybrid_that_generates(sala, teacher, tmp_path):
    out = tmp_path / "run" / "final"
    uniform = ("--set", "conversion.keep.method=uniform")
    outcome = sala("convert", "--teacher", teacher, "--recipe", "smoke", "--out", out.parent, *uniform)
    assert (outcome.code, outcome.out) == (0, f"{out}\n")
    assert "align: step 2 of 2" in outcome.err
    assert (out / "recipe.yaml").is_file()
    assert sala("generate", "--model", out, "--prompt", "x", "-n", "3").code == 0
    assert json.loads(sala("inspect", out, "--json").out)["mixer_types"].count("minicpm4") == 1


def test_the_last_validation_loss_stays_in_sight():
    stream = io.StringIO()
    with Display(Console(file=stream, width=200)) as display:
        display.observe(step(1, validation_loss=0.75))
        display.observe(step(3))
    first, last = stream.getvalue().splitlines()
    assert "loss 0.5000, validation 0.7500" in first and "loss 0.5000, validation 0.7500" in last
