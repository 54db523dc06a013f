"""A save that is interrupted, or runs out of space, leaves the old model or the new one, and nothing else."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from trial_models import adapt, answer, contents, load, write_facts

from engram_hf.convert_scripts import convert_deepseek_v41

CASES = [("old files", "mapped"), ("old plain", "mapped"), ("old plain", "resident"), ("old files", "resident")]


def interrupted(seconds: float, action: Callable[[], object]) -> bool:
    """Return whether a real signal after `seconds` raised KeyboardInterrupt in `action`, as Ctrl-C does, before it
    ended.
    """
    ended = False

    def interrupt(*_):
        if not ended:  # Otherwise it came too late, and would interrupt the test.
            raise KeyboardInterrupt

    try:
        try:
            signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            action()
        finally:
            ended = True
    except KeyboardInterrupt:
        return True
    except OSError as error:
        # `shutil.rmtree`, interrupted between closing a folder and recording that it is closed, closes it again.
        if error.errno == errno.EBADF and isinstance(error.__context__, KeyboardInterrupt):
            return True
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return False


@pytest.fixture(scope="module")
def answers(folders):
    return {name: answer(load(folders[f"{name} plain"])) for name in ("old", "new")}


def named(folder, answers) -> str:
    """Return which of two models a folder holds; raise if it is neither."""
    found = answer(load(folder))
    (name,) = [name for name, logits in answers.items() if torch.equal(found, logits)]
    return name


@pytest.mark.parametrize(("over", "residency"), CASES)
def test_save_interrupted_at_random_moments(folders, answers, tmp_path, draw, rounds, over, residency):
    model, target, seen = load(folders["new files"], residency), tmp_path / "target", []
    model.save_pretrained(tmp_path / "once")
    replaced = {
        name for name in contents(folders[over]) if name.startswith(("model", "engram-layer", "engram_tables"))
    }
    expected = set(contents(tmp_path / "once")) | set(contents(folders[over])) - replaced
    begin = time.perf_counter()
    model.save_pretrained(tmp_path / "twice")
    span = time.perf_counter() - begin
    for _ in range(rounds(12)):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folders[over], target)
        before = contents(target)
        interrupted(draw.uniform(1e-4, span), lambda: model.save_pretrained(target))
        seen.append(named(target, answers))
        found = {name for name in contents(target) if name != ".engram-lock"}
        assert found == (set(before) if seen[-1] == "old" else expected)
    assert "old" in seen


@pytest.mark.parametrize(("over", "residency"), CASES)
def test_save_without_space(folders, answers, tmp_path, draw, rounds, over, residency):
    """A limit on the size of files stops a write as a full disk does, at each file size of the save."""
    model, target = load(folders["new files"], residency), tmp_path / "target"
    model.save_pretrained(tmp_path / "whole")
    sizes = sorted({path.stat().st_size for path in (tmp_path / "whole").iterdir()})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for size in draw.sample(sizes, min(len(sizes), rounds(5))):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folders[over], target)
        before = contents(target)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
        try:
            model.save_pretrained(target)
            failed = False
        except Exception:  # The error is safetensors' or the system's, depending on the file that did not fit.
            failed = True
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        # Tables are linked, so their size does not matter.
        assert named(target, answers) == ("old" if failed else "new"), size
        assert contents(target) == before if failed else True
        assert not [name for name in os.listdir(target) if name.startswith(".")]
    signal.signal(signal.SIGXFSZ, handler)


def test_facts_write_interrupted_or_without_space(folders, tmp_path, draw, rounds):
    """`engram facts write` over an older adapter leaves that one or the new one."""
    target, known = tmp_path / "target", [contents(folders[f"{name} facts"]) for name in ("old", "new")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for index in range(rounds(6)):
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folders["old facts"], target)
            if index % 3:
                codes = []
                interrupted(
                    draw.uniform(0.01, 1), lambda c=codes: c.append(write_facts(folders["old files"], target, "w8"))
                )
                assert codes in ([], [0], [130])
            else:
                size = draw.choice([len(data) for data in known[0].values()])
                resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
                assert write_facts(folders["old files"], target, "w8") == 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert contents(target) in known
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_interrupted_save_of_an_adapter_by_peft(folders, tmp_path, draw, rounds):
    """PEFT writes an adapter file by file: after an interrupt it is the old one, the new one, or refused."""
    adapters = [
        PeftModel.from_pretrained(load(folders["old plain"]), folders[f"{name} facts"]) for name in ("old", "new")
    ]
    answers = [answer(model) for model in adapters]
    assert not torch.equal(*answers)
    begin = time.perf_counter()
    adapters[1].save_pretrained(tmp_path / "whole")
    span = time.perf_counter() - begin
    for index in range(rounds(4)):
        target = shutil.copytree(folders["old facts"], tmp_path / str(index))
        interrupted(draw.uniform(1e-4, span), lambda target=target: adapters[1].save_pretrained(target))
        try:
            found = answer(adapt(load(folders["old plain"]), target))
        except (ValueError, SafetensorError):  # The file is truncated, or has rows that the config does not know.
            pass
        else:
            assert any(torch.equal(found, one) for one in answers)
    shutil.copy(folders["old facts"] / "adapter_config.json", tmp_path / "whole")
    with pytest.raises(ValueError, match="its files belong to two adapters"):
        adapt(load(folders["old plain"]), tmp_path / "whole")


def load_and_save(folder, target, seconds):
    interrupted(seconds, lambda: load(folder, "mapped").save_pretrained(target))


def test_load_and_save_interrupted_at_random_moments(folders, answers, tmp_path, draw, rounds):
    """It saves in place, too, and in separate processes: an interrupted load may leave transformers building on no
    device.
    """
    target = shutil.copytree(folders["new files"], tmp_path / "target")
    for _ in range(rounds(8)):
        arguments = (target, target, draw.uniform(1e-3, 0.3))
        process = multiprocessing.get_context("fork").Process(target=load_and_save, args=arguments)
        process.start()
        process.join()
        assert named(target, answers) == "new"
    assert contents(target).keys() == contents(folders["new files"]).keys()


def test_interrupted_conversion_resumes(golden, tmp_path, draw, rounds):
    source = tmp_path / "source"
    shutil.copytree(golden / "deepseek_v41_tiny", source, ignore=shutil.ignore_patterns("golden.safetensors"))
    begin = time.perf_counter()
    assert convert_deepseek_v41.main([str(source), str(tmp_path / "whole")]) == 0
    span, expected = time.perf_counter() - begin, contents(tmp_path / "whole")
    for index in range(rounds(6)):
        target, codes = tmp_path / "target", []
        command = [str(source), str(target)]
        interrupted(
            draw.uniform(0.01, span),
            lambda command=command, codes=codes: codes.append(convert_deepseek_v41.main(command)),
        )
        assert codes in ([], [0], [130]), index
        assert convert_deepseek_v41.main([str(source), str(target)]) == 0
        assert contents(target) == expected
        shutil.rmtree(target)
