"""Downloads and zip files: complete or not there at all, and never outside their folder."""

import hashlib
import io
import shutil
import stat
import urllib.request
import zipfile
from collections import namedtuple

import pytest

from atom_fast.data.archives import download_file, unpack_zip


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def entries(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def served(tmp_path):
    """A file of 3 MB, its URL and its MD5 sum."""
    source = tmp_path / "served" / "data.bin"
    source.parent.mkdir()
    source.write_bytes(bytes(range(256)) * 12_000)
    return source, source.as_uri(), hashlib.md5(source.read_bytes()).hexdigest()


def test_a_download_arrives_whole_and_shows_progress(served, tmp_path, capsys):
    source, url, md5 = served
    target = tmp_path / "new" / "folder" / "data.zip"
    download_file(url, target, md5=md5)
    assert target.read_bytes() == source.read_bytes()
    assert entries(target.parent) == ["data.zip"]
    assert "data.zip" in capsys.readouterr().err


@pytest.mark.fault("Damaged files", "a download arrives with other bytes than published", "refused, nothing is left")
def test_a_download_with_other_bytes_is_refused_and_leaves_nothing(served, tmp_path):
    _, url, _ = served
    target = tmp_path / "to" / "data.zip"
    with pytest.raises(RuntimeError, match=f"could not download {url} to .*data.zip: .*MD5"):
        download_file(url, target, md5="0" * 32, progress=False)
    assert entries(target.parent) == []


def test_a_download_that_fails_names_the_address_and_keeps_what_was_there(tmp_path):
    target = tmp_path / "data.zip"
    target.write_text("old")
    with pytest.raises(RuntimeError, match=r"could not download file://.*absent.*No such file"):
        download_file((tmp_path / "absent").as_uri(), target, md5="0" * 32, progress=False)
    assert entries(tmp_path) == ["data.zip"] and target.read_text() == "old"


def test_a_file_may_be_downloaded_by_two_at_once(served, tmp_path, monkeypatch):
    source, url, md5 = served
    target = tmp_path / "to" / "data.zip"
    others = iter([True])

    class Slow(io.BufferedReader):
        """Between its first two blocks another process begins and ends the same download."""

        headers = {}

        def read(self, size):
            if self.tell() and next(others, False):
                with pytest.raises(RuntimeError, match="MD5"):
                    download_file(url, target, md5="0" * 32, progress=False)
            return super().read(size)

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Slow(io.FileIO(source)))
    download_file(url, target, md5=md5, progress=False)
    assert next(others, None) is None
    assert target.read_bytes() == source.read_bytes() and entries(target.parent) == ["data.zip"]


def test_a_zip_is_unpacked_beside_itself(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"set/": "", "set/one.txt": "1", "set/deep/two.txt": "2", "other/x": "x"})
    folder = unpack_zip(archive, "set", progress=False)
    assert folder == tmp_path / "set"
    assert (folder / "one.txt").read_text() == "1" and (folder / "deep/two.txt").read_text() == "2"
    assert entries(tmp_path) == ["a.zip", "set"]


@pytest.mark.fault(
    "Hostile files",
    "a zip file with names that lead out of its folder (`..`, absolute, drives, backslashes)",
    "refused before anything is written",
)
@pytest.mark.parametrize(
    "name",
    ["../evil.txt", "set/../../evil.txt", "/tmp/evil.txt", "C:\\evil.txt", "set\\..\\..\\evil.txt", "\\\\host\\evil"],
)
def test_a_name_that_leads_out_of_the_folder_is_refused_before_anything_is_written(tmp_path, name):
    home = tmp_path / "home"
    home.mkdir()
    archive = make_zip(home / "a.zip", {"set/one.txt": "1", name: "evil"})
    with pytest.raises(ValueError, match="leads out of its folder") as refusal:
        unpack_zip(archive, "set", progress=False)
    assert repr(name) in str(refusal.value)
    assert entries(home) == ["a.zip"] and entries(tmp_path) == ["home"]


@pytest.mark.fault("Hostile files", "a zip file with a symbolic link", "refused before anything is written")
def test_a_symbolic_link_is_refused(tmp_path):
    link = zipfile.ZipInfo("set/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive = make_zip(tmp_path / "a.zip", {"set/one.txt": "1"})
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(link, "/etc")
    with pytest.raises(ValueError, match="'set/link', a symbolic link"):
        unpack_zip(archive, "set", progress=False)
    assert entries(tmp_path) == ["a.zip"]


@pytest.mark.fault(
    "Hostile files", "a zip file with a device, a pipe or a socket", "an ordinary file, or none, is made of it"
)
@pytest.mark.parametrize("kind", [stat.S_IFBLK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK])
def test_special_files_become_ordinary_ones(kind, tmp_path):
    special = zipfile.ZipInfo("set/special")
    special.external_attr = (kind | 0o4777) << 16
    archive = make_zip(tmp_path / "a.zip", {"set/one.txt": "1"})
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(special, "content")
    made = unpack_zip(archive, "set", progress=False) / "special"
    assert made.is_file() and made.read_text() == "content" and not made.stat().st_mode & stat.S_ISUID


@pytest.mark.fault(
    "Hostile files", "a zip file with a password, a nameless member, or a false size", "refused, nothing is left"
)
@pytest.mark.parametrize("place", ["flags", "name", "size"])
def test_a_zip_with_false_entries_is_refused(place, tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"set/one.txt": "1" * 5000, "set/two.txt": "2"})
    content = bytearray(archive.read_bytes())
    local, entry = content.index(b"PK\3\4"), content.index(b"PK\1\2")
    if place == "flags":
        content[entry + 8] |= 1
        content[local + 6] |= 1
    elif place == "name":
        second = content.index(b"PK\1\2", entry + 1)
        content[second + 46] = 0  # names end at a zero
    else:
        content[entry + 24 : entry + 28] = (100).to_bytes(4, "little")
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="a.zip is not a complete zip file"):
        unpack_zip(archive, "set", progress=False)
    assert entries(tmp_path) == ["a.zip"]


@pytest.mark.fault("Damaged files", "a downloaded zip file is cut short or damaged", "refused by name, nothing is left")
def test_a_truncated_or_damaged_zip_is_named_and_leaves_nothing(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {f"set/{i}.txt": f"{i}" * 500 for i in range(50)})
    whole = archive.read_bytes()
    damaged = bytearray(whole)
    start = whole.index(b"set/30.txt") + 12  # inside the compressed bytes of one member
    damaged[start : start + 4] = b"\xff\xff\xff\xff"
    for content in (whole[: len(whole) // 2], b"", bytes(damaged)):
        archive.write_bytes(content)
        with pytest.raises(ValueError, match=r"a.zip is not a complete zip file .*download it again"):
            unpack_zip(archive, "set", progress=False)
        assert entries(tmp_path) == ["a.zip"]


def test_a_zip_without_the_folder_is_refused(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"other/one.txt": "1"})
    with pytest.raises(ValueError, match="a.zip holds no folder set/"):
        unpack_zip(archive, "set", progress=False)


def test_what_is_there_already_is_not_overwritten(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"set/one.txt": "1"})
    (tmp_path / "set").mkdir()
    with pytest.raises(FileExistsError, match="exists but is not complete; remove it"):
        unpack_zip(archive, "set", progress=False)
    assert entries(tmp_path / "set") == []


@pytest.mark.fault("Full disks", "a zip file unpacks to more than the disk has free", "refused before it is unpacked")
def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "a.zip", {"set/zeros": b"\0" * 5_000_000})
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(OSError, match="needs 5 MB, but its disk has 1 MB free"):
        unpack_zip(archive, "set", progress=False)
    assert entries(tmp_path) == ["a.zip"]
