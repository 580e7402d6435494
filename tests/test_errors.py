"""What the machine lacks, in one line with advice that fits what was being done."""

import errno
import os

import pytest

from temper.errors import UserError, lack, one_line_errors, visible


@pytest.mark.parametrize(
    ("stage", "advice"),
    [
        ("train_adapter", "lower train.per_device_train_batch_size"),
        ("evaluate_model", "lower eval.batch_size"),
        ("sample_answers", "lower method.own_answers.batch_size"),
        ("predict", "lower --batch-size"),
        ("plan", "close other programs"),
        ("compare_runs", "close other programs"),
    ],
)
def test_what_takes_less_memory_depends_on_what_is_done(stage, advice):
    said = str(lack(MemoryError(), "it", stage))
    assert said.startswith(f"it: out of memory; {advice}")
    assert ("train." in said) is (stage == "train_adapter")


def test_only_what_goes_on_is_said_to_go_on():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "it goes on where this one stopped" in str(lack(full, "it", "train_adapter"))
    assert str(lack(full, "it", "plan")).endswith("then run the same command again")
    assert "the disk is full" in str(lack(OSError("11360 requested and 2896 written"), "x.gguf", "export"))


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO])
def test_a_path_that_the_system_refuses_is_one_line(number, capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors("it", "merge_adapter"):
        raise OSError(number, os.strerror(number), "results/x")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: results/x")


def test_a_file_that_our_code_misses_is_no_fault_of_the_users():
    assert lack(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "results/x"), "it") is None


def test_an_error_is_one_line_whatever_it_quotes(capsys):
    with pytest.raises(SystemExit), one_line_errors("it"):
        raise UserError("column 'a\nb\x1b[31m\ud83d': 5 € für 你好 👍")
    assert capsys.readouterr().err == "error: column 'a\\nb\\x1b[31m\\ud83d': 5 € für 你好 👍\n"
    assert visible("a\u2028b\x85") == "a\\u2028b\\x85"


def test_what_is_not_seen_but_turns_or_hides_other_text_is_shown():
    marks = "\u202e\u2066\u200f\u061c\u200b\u2060\ufeff\u00ad\U000e0041"
    assert visible(f"a{marks}b") == f"a{marks.encode('unicode_escape').decode()}b"
    readable = "क्\u200dष  می\u200cخواهم  👩\u200d💻  ❤\ufe0f  \u0600١٢  שלום"
    assert visible(readable) == readable
