"""Files that are read and written whole: what is refused and how, and what is left behind."""

import errno
import os
import stat

import pytest

from packlight import InputError
from packlight._files import read_text, replaced, write_text

MOST = 2**24


@pytest.fixture
def path(tmp_path):
    return tmp_path / "text.toml"


def test_a_text_comes_back(path):
    write_text(path, "å\n")
    assert path.read_bytes() == "å\n".encode()
    assert read_text(path) == "å\n"
    assert read_text(str(path)) == "å\n"


# --- Reading.


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none", "No such file or directory"),
        (".", "Is a directory"),
        ("/dev/null", "Is a device or a pipe, not a file"),
    ],
)
def test_what_is_no_file_is_not_read(tmp_path, name, reason):
    with pytest.raises(InputError, match=f"{name} cannot be read: {reason}$"):
        read_text(f"{tmp_path}/{name}" if name == "none" else name)


def test_a_file_of_no_sensible_size_is_not_read(path):
    path.write_bytes(b"a" * MOST)
    assert len(read_text(path)) == MOST
    path.write_bytes(b"a" * (MOST + 1))
    with pytest.raises(InputError, match=f"it has {MOST + 1} bytes, at most {MOST} are expected"):
        read_text(path)


def test_the_line_that_is_not_utf8_is_named(path):
    path.write_bytes(b"a\nb\nc\xff\n")
    with pytest.raises(InputError, match=r"text\.toml:3: not UTF-8"):
        read_text(path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(InputError, match=r"text\.toml:1: not UTF-8"):
        read_text(path)


def test_a_path_with_a_null_is_refused():
    with pytest.raises(InputError, match=r"'a\\x00' cannot be read: embedded null"):
        read_text("a\0")
    with pytest.raises(InputError, match=r"'a\\x00' cannot be written: .*embedded null"):
        write_text("a\0", "text")


# --- Writing.


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o755])
def test_permissions_of_a_file_that_is_there_stay(path, mode):
    write_text(path, "one")
    usual = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode)
    write_text(path, "two")
    assert path.read_text() == "two"
    assert stat.S_IMODE(path.stat().st_mode) == mode
    path.unlink()
    write_text(path, "three")
    assert stat.S_IMODE(path.stat().st_mode) == usual


def test_a_link_stays_one(path, tmp_path):
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "target"
    path.symlink_to(target)
    write_text(path, "text")
    assert path.is_symlink()
    assert target.read_text() == "text"


def test_what_is_written_lies_beside_under_a_name_with_the_same_ending(path):
    path.write_text("before")
    with replaced(path) as beside:
        assert (beside.parent, beside.suffix) == (path.parent, path.suffix)
        assert beside != path
        assert not beside.exists()
        with replaced(path) as other:
            assert other != beside
            other.write_text("first")
        beside.write_text("after")
        assert path.read_text() == "first"
    assert path.read_text() == "after"
    assert os.listdir(path.parent) == [path.name]


class Strange(OSError):
    def __str__(self):
        return "strange"


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "full"), InputError, "text.toml cannot be written: full"),
        (Strange(), InputError, "cannot be written: strange"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no"), InputError, "written: 'utf-8' codec"),
        (ValueError("a null"), InputError, "text.toml' cannot be written: a null"),
        (ValueError("another"), ValueError, "^another$"),
        (InputError("null"), InputError, "^null$"),
        (KeyError("key"), KeyError, "key"),
    ],
    ids=repr,
)
def test_an_error_leaves_what_was_there(path, error, raised, message):
    path.write_text("before")

    def write():
        with replaced(path) as beside:
            beside.write_text("half")
            raise error

    with pytest.raises(raised, match=message) as found:
        write()
    assert type(found.value) is raised
    assert path.read_text() == "before"
    assert os.listdir(path.parent) == [path.name]


def test_a_disk_that_says_late_that_it_is_full_leaves_what_was_there(path, monkeypatch):
    path.write_text("before")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="cannot be written: No space left"):
        write_text(path, "after")
    assert path.read_text() == "before"
    assert os.listdir(path.parent) == [path.name]


def test_what_cannot_be_written_is_refused_before_anything_is(path, tmp_path, monkeypatch):
    for name, reason in (
        (tmp_path, "Is a directory"),
        ("/dev/null", "Is a device or a pipe"),
        (tmp_path / "no" / "file", "No such file"),
    ):
        with pytest.raises(InputError, match=f"cannot be written: {reason}"):
            write_text(name, "text")
    path.write_text("before")
    # A superuser may write to any file.
    monkeypatch.setattr(os, "access", lambda found, mode: mode != os.W_OK)
    with (
        pytest.raises(InputError, match="cannot be written: Permission denied"),
        replaced(path),
    ):
        raise AssertionError
