"""Whose files are run: nobody else's, and only whole ones."""
import os
import pwd
import stat

import pytest

from edgeattn.runtime import trusted

NOBODY = 65534


@pytest.fixture(autouse=True)
def nothing_remembered():
    """What is kept of a folder stays true in one process; a test changes it."""
    trusted._reason.cache_clear()
    trusted._private.cache_clear()
    yield
    trusted._reason.cache_clear()
    trusted._private.cache_clear()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a" / "b" / "kept"
    trusted.write(path, b"content")
    return path


def refused(path):
    """The reason, from reading and from writing."""
    trusted._reason.cache_clear()
    with pytest.raises(trusted.Untrusted) as read:
        trusted.read(path)
    return str(read.value)


def test_what_was_written_is_read(path):
    assert trusted.read(path) == trusted.read(str(path)) == b"content"
    trusted.write(path, b"")
    assert trusted.read(path) == b""
    assert [entry.name for entry in path.parent.iterdir()] == ["kept"]
    with pytest.raises(FileNotFoundError):
        trusted.read(path.with_name("other"))


def test_no_byte_can_be_another(path):
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:])
        with pytest.raises(ValueError, match="kept is damaged"):
            trusted.read(path)
    for other in (whole[:-1], whole + b"x", whole[:20], b""):
        path.write_bytes(other)
        with pytest.raises(ValueError, match="kept is damaged"):
            trusted.read(path)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o757, 0o722])
def test_a_folder_others_may_write_to_is_refused(path, mode):
    path.parent.chmod(mode)
    assert refused(path) in (f"everybody may write to {path.parent}",
                             f"the members of a group ({path.stat().st_gid}) may write to {path.parent}")
    with pytest.raises(trusted.Untrusted):
        trusted.write(path.with_name("other"), b"content")
    assert [entry.name for entry in path.parent.iterdir()] == ["kept"]


def test_a_folder_on_the_way_that_others_may_write_to_is_refused_unless_entries_stay_their_makers(path):
    path.parents[1].chmod(0o777)
    assert refused(path) == f"everybody may write to {path.parents[1]}"
    path.parents[1].chmod(0o1777)
    trusted._reason.cache_clear()
    assert trusted.read(path) == b"content"


@pytest.mark.parametrize("mode", [0o646, 0o666])
def test_a_file_others_may_write_to_is_refused(path, mode):
    path.chmod(mode)
    assert refused(path) == f"everybody may write to {path}"
    trusted.write(path, b"new")  # by another file
    assert trusted.read(path) == b"new"


@pytest.mark.parametrize("private", [True, False])
def test_a_group_may_write_where_it_is_its_owners_own(path, monkeypatch, private):
    user = pwd.getpwuid(os.geteuid())

    class Group:
        gr_name, gr_mem = user.pw_name, [] if private else [user.pw_name, "somebody"]
    monkeypatch.setattr("grp.getgrgid", lambda group: Group)
    monkeypatch.setattr("pwd.getpwuid", lambda number: type("User", (), {"pw_name": user.pw_name, "pw_gid": path.stat().st_gid}))
    path.chmod(0o664)
    path.parent.chmod(0o775)
    if private:
        assert trusted.read(path) == b"content"
    else:
        assert refused(path) == f"the members of a group ({path.stat().st_gid}) may write to {path.parent}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away; run as root")
@pytest.mark.parametrize("level", [0, 1, 2])
def test_what_belongs_to_another_user_is_refused(path, level):
    foreign = (path, path.parent, path.parents[1])[level]
    os.chown(foreign, NOBODY, NOBODY)
    assert refused(path).startswith(f"{foreign} belongs to ")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away; run as root")
def test_the_owner_of_the_sources_is_trusted(path, monkeypatch, tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    os.chown(sources, NOBODY, NOBODY)
    monkeypatch.setattr(trusted, "_PACKAGE", str(sources))
    os.chown(path, NOBODY, NOBODY)
    os.chown(path.parent, NOBODY, NOBODY)
    assert trusted.read(path) == b"content"


def test_a_folder_that_leads_to_the_sources_is_not_asked(tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    (shared / "package").mkdir(parents=True)
    monkeypatch.setattr(trusted, "_PACKAGE", str(shared / "package"))
    trusted.write(shared / "package" / "cache" / "kept", b"content")
    trusted.write(shared / "kept", b"content")
    shared.chmod(0o777)
    trusted._reason.cache_clear()
    assert trusted.read(shared / "package" / "cache" / "kept") == b"content"
    assert refused(shared / "kept") == f"everybody may write to {shared}"  # not on the way: the folder itself


def test_links_are_followed_through_every_folder_they_pass(path, tmp_path):
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    (open_to_all / "link").symlink_to(path.parent)
    (tmp_path / "first").symlink_to("open/link")
    assert trusted.read(tmp_path / "first" / "kept") == b"content"
    open_to_all.chmod(0o777)
    assert refused(tmp_path / "first" / "kept") == f"everybody may write to {open_to_all}"
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError, match="too many links"):
        trusted.read(tmp_path / "round" / "kept")


def test_what_comes_to_be_is_looked_at_anew(tmp_path):
    trusted.check_folder(tmp_path / "later" / "kept")
    (tmp_path / "later").mkdir()
    (tmp_path / "later").chmod(0o777)
    with pytest.raises(trusted.Untrusted):
        trusted.check_folder(tmp_path / "later" / "kept")
    with pytest.raises(trusted.Untrusted):
        trusted.write(tmp_path / "later" / "kept" / "file", b"content")
    assert not list((tmp_path / "later").iterdir())
    with pytest.raises(NotADirectoryError):
        trusted.check_folder("/dev/null/cache")


def test_only_a_file_is_read(path):
    path.with_name("link").symlink_to("kept")
    with pytest.raises(OSError, match="[Ll]evels|[Ll]inks"):
        trusted.read(path.with_name("link"))
    os.mkfifo(path.with_name("pipe"), 0o644)
    with pytest.raises(ValueError, match="pipe is not a file"):
        trusted.read(path.with_name("pipe"))
    with pytest.raises((ValueError, IsADirectoryError)):
        trusted.read(path.parent)


def test_files_and_folders_are_made_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        trusted.write(tmp_path / "a" / "b" / "kept", b"content")
    finally:
        os.umask(before)
    for made in (tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "kept"):
        assert stat.S_IMODE(made.stat().st_mode) & 0o022 == 0
    assert trusted.read(tmp_path / "a" / "b" / "kept") == b"content"


def test_a_write_that_fails_leaves_nothing(path, monkeypatch):
    def fail(*_):
        raise OSError("full")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        trusted.write(path, b"new")
    assert [entry.name for entry in path.parent.iterdir()] == ["kept"]
    assert trusted.read(path) == b"content"
