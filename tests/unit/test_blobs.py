"""Files beside messages: durable before the message, safe against names from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from postroom import DecodeError, ValidationError
from postroom.store.blobs import BlobStore, safe_name


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "uploads")


def test_a_file_is_kept_found_and_removed(blobs: BlobStore, tmp_path: Path) -> None:
    source = tmp_path / "cat.jpg"
    source.write_bytes(b"meow")
    reference = blobs.copy("id-1", "photo", source)
    assert blobs.resolve("id-1", reference).read_bytes() == b"meow"
    blobs.remove("id-1")
    blobs.remove("id-1")
    with pytest.raises(DecodeError, match="missing"):
        blobs.resolve("id-1", reference)


def test_a_failed_write_leaves_nothing(blobs: BlobStore) -> None:
    def upload() -> None:
        with blobs.writer("id-1", "photo", "cat.jpg") as (_, file):
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        upload()
    assert not (blobs.directory / "id-1").exists()


def test_a_missing_source_is_the_callers_mistake(blobs: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(ValidationError) as caught:
        blobs.copy("id-1", "photo", tmp_path / "nothing.jpg")
    assert caught.value.field == "photo"


@pytest.mark.parametrize(
    "reference",
    [
        "upload:../id-2/photo/x",
        "upload:photo/../../id-2/photo/x",
        "upload:photo/..",
        "photo/x",
        "/etc/passwd",
        "upload:/x",
    ],
)
def test_references_cannot_leave_their_message(blobs: BlobStore, tmp_path: Path, reference: str) -> None:
    other = tmp_path / "x"
    other.write_bytes(b"secret")
    blobs.copy("id-2", "photo", other)
    with pytest.raises(DecodeError):
        blobs.resolve("id-1", reference)


@pytest.mark.parametrize("message_id", ["", ".", "..", "../x", "a/b", "/"])
def test_ids_from_outside_cannot_remove_anything_else(blobs: BlobStore, tmp_path: Path, message_id: str) -> None:
    source = tmp_path / "x"
    source.write_bytes(b"x")
    blobs.copy("a", "photo", source)
    (tmp_path / "uploads" / "a" / "b").mkdir()
    blobs.remove(message_id)
    assert (blobs.directory / "a" / "photo" / "x").exists()
    assert source.exists()


@pytest.mark.parametrize(
    ("given", "kept"), [("cat.jpg", "cat.jpg"), ("../../etc/passwd", "passwd"), ("C:\\pictures\\a b.png", "a b.png")]
)
def test_file_names_from_outside_are_reduced_to_their_last_part(given: str, kept: str) -> None:
    assert safe_name(given) == kept


@pytest.mark.parametrize("name", ["", "..", "a/", "x" * 300, "a\0b", "a\nb"])
def test_unusable_file_names_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        safe_name(name)


def test_old_files_are_found(blobs: BlobStore, tmp_path: Path) -> None:
    source = tmp_path / "x"
    source.write_bytes(b"x")
    assert blobs.older_than(0) == []
    blobs.copy("id-1", "photo", source)
    assert blobs.older_than(3600) == []
    assert blobs.older_than(-5) == ["id-1"]
