from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import shutil
from pathlib import Path

import pytest

from device_agents import wire
from edgevit import bundle, signing
from edgevit.chunks import make_index, with_chunk_index
from edgevit.errors import BundleError, EdgevitError, UsageError
from tests.support.bundles import make_bundle, make_manifest


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return signing.make_key(tmp_path / "key", "test")


@pytest.fixture
def signers(key: Path, tmp_path: Path) -> Path:
    path = tmp_path / "signers"
    path.write_text(signing.allowed_signers_line("ann", signing.public_line(key)) + "\n")
    return path


@pytest.fixture
def made(key: Path, tmp_path: Path) -> bundle.Bundle:
    return make_bundle(tmp_path / "bundle", key)


def write(out: Path, key: Path, manifest: wire.Manifest, blobs: dict[str, Path | bytes]) -> bundle.Bundle:
    return bundle.write_bundle(out, manifest, blobs, lambda data: signing.sign(data, key))


def test_what_was_written_opens_and_names_its_signer(made: bundle.Bundle, signers: Path) -> None:
    opened = bundle.open_bundle(made.path, signers)
    assert (opened.digest, opened.manifest, opened.signer) == (made.digest, made.manifest, "ann")
    for blob in opened.manifest.blobs():
        assert opened.blob_path(blob.sha256).stat().st_size == blob.size
    with pytest.raises(BundleError):
        opened.blob_path("../../etc/passwd")


def test_one_flipped_bit_anywhere_is_refused(made: bundle.Bundle, signers: Path) -> None:
    """Every file, 40 seeded bits each; the manifest and signature included."""
    rng = random.Random(4)
    for path in sorted(p for p in made.path.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for _ in range(10):
            bit = rng.randrange(len(whole) * 8)
            data = bytearray(whole)
            data[bit // 8] ^= 1 << (bit % 8)
            path.write_bytes(bytes(data))
            with pytest.raises(BundleError):
                bundle.open_bundle(made.path, signers)
        path.write_bytes(whole)
    bundle.open_bundle(made.path, signers)


def test_an_unknown_signer_is_refused(made: bundle.Bundle, tmp_path: Path) -> None:
    other = signing.make_key(tmp_path / "other", "other")
    signers = tmp_path / "others"
    signers.write_text(signing.allowed_signers_line("eve", signing.public_line(other)) + "\n")
    with pytest.raises(BundleError, match="unknown-signer"):
        bundle.open_bundle(made.path, signers)


def test_a_missing_signature_is_refused(made: bundle.Bundle) -> None:
    (made.path / "manifest.json.sig").unlink()
    with pytest.raises(BundleError, match="missing"):
        bundle.open_bundle(made.path, None)


def test_a_signature_in_another_spelling_is_refused(made: bundle.Bundle, signers: Path) -> None:
    path = made.path / "manifest.json.sig"
    path.write_bytes(path.read_bytes() + b"\n")
    for given in (None, signers):
        with pytest.raises(BundleError, match="canonical"):
            bundle.open_bundle(made.path, given)


@pytest.mark.parametrize("where", ["manifest.json", "manifest.json.sig", "blobs", "a blob"])
def test_links_are_refused(made: bundle.Bundle, tmp_path: Path, where: str) -> None:
    path = next((made.path / "blobs").iterdir()) if where == "a blob" else made.path / where
    moved = tmp_path / "elsewhere"
    path.rename(moved)
    path.symlink_to(moved)
    with pytest.raises(BundleError, match="not a"):
        bundle.open_bundle(made.path, None)


def test_a_pipe_in_the_place_of_a_blob_is_refused_and_not_waited_for(made: bundle.Bundle) -> None:
    path = next((made.path / "blobs").iterdir())
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BundleError, match="not a regular file"):
        bundle.open_bundle(made.path, None)


@pytest.mark.parametrize("where", ["stray", "blobs/stray"])
def test_files_that_the_manifest_does_not_name_are_refused(made: bundle.Bundle, where: str) -> None:
    (made.path / where).write_text("x")
    with pytest.raises(BundleError, match="stray"):
        bundle.open_bundle(made.path, None)


def test_a_missing_or_shorter_blob_is_named(made: bundle.Bundle) -> None:
    path = next((made.path / "blobs").iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=path.name):
        bundle.open_bundle(made.path, None)
    path.unlink()
    with pytest.raises(BundleError, match=path.name):
        bundle.open_bundle(made.path, None)


def test_a_manifest_of_a_gigabyte_is_refused_unread(made: bundle.Bundle) -> None:
    with (made.path / "manifest.json").open("r+b") as f:
        f.truncate(1 << 30)
    with pytest.raises(BundleError, match="1,073,741,824"):
        bundle.open_bundle(made.path, None)


def test_a_newer_schema_says_so(made: bundle.Bundle, key: Path) -> None:
    data = made.manifest_bytes.replace(b"edgevit.bundle/1", b"edgevit.bundle/2")
    (made.path / "manifest.json").write_bytes(data)
    (made.path / "manifest.json.sig").write_bytes(signing.sign(data, key))
    with pytest.raises(BundleError, match="newer-schema") as caught:
        bundle.open_bundle(made.path, None)
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize("digest", ["../" + "a" * 61, "/etc/passwd", "A" * 64])
def test_paths_in_the_place_of_digests_are_refused(made: bundle.Bundle, key: Path, digest: str) -> None:
    data = made.manifest_bytes.replace(made.manifest.golden.blob.sha256.encode(), digest.encode())
    (made.path / "manifest.json").write_bytes(data)
    (made.path / "manifest.json.sig").write_bytes(signing.sign(data, key))
    with pytest.raises(BundleError, match="bad-manifest"):
        bundle.open_bundle(made.path, None)


def test_no_bundle_and_several_bundles_are_said_apart(tmp_path: Path, key: Path) -> None:
    with pytest.raises(UsageError, match="no such"):
        bundle.open_bundle(tmp_path / "absent", None)
    folder = tmp_path / "several"
    folder.mkdir()
    with pytest.raises(UsageError, match="no bundle there"):
        bundle.open_bundle(folder, None)
    for name in ("one", "two"):
        make_bundle(folder / name, key)
    with pytest.raises(UsageError, match=r"one.*two"):
        bundle.open_bundle(folder, None)


def test_the_same_content_is_left_untouched(made: bundle.Bundle, key: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in made.path.rglob("*")}
    again = make_bundle(made.path, key, version=made.manifest.version + 1)
    assert again.digest == made.digest
    assert {p: p.stat().st_mtime_ns for p in made.path.rglob("*")} == before


def test_a_newer_bundle_of_the_same_name_takes_the_place_whole(made: bundle.Bundle, key: Path, signers: Path) -> None:
    newer = make_bundle(made.path, key, seed=2, version=2)
    assert bundle.open_bundle(made.path, signers).digest == newer.digest != made.digest
    assert [p.name for p in made.path.parent.iterdir() if p.name.startswith(".")] == []


def test_the_same_again_with_another_key_is_signed_by_that_key(made: bundle.Bundle, tmp_path: Path) -> None:
    """As after `edgevit key revoke`: a signature that no device accepts any more must not stay."""
    newer = signing.make_key(tmp_path / "newer", "newer")
    signers = tmp_path / "newer-signers"
    signers.write_text(signing.allowed_signers_line("bob", signing.public_line(newer)) + "\n")
    again = make_bundle(made.path, newer)
    opened = bundle.open_bundle(made.path, signers)
    assert (opened.signer, opened.digest, opened.signature) == ("bob", made.digest, again.signature)
    assert [p.name for p in made.path.parent.iterdir() if p.name.startswith(".")] == []


def test_a_damaged_bundle_is_written_anew(made: bundle.Bundle, key: Path, signers: Path) -> None:
    next((made.path / "blobs").iterdir()).write_bytes(b"damage")
    make_bundle(made.path, key)
    bundle.open_bundle(made.path, signers)


@pytest.mark.parametrize("content", ["foreign file", "foreign bundle", "bundle and more"])
def test_foreign_directories_are_not_written_into(tmp_path: Path, key: Path, content: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if content == "foreign file":
        (out / "thesis.txt").write_text("years of work")
    elif content == "foreign bundle":
        write(out, key, *make_manifest(name="another"))
    else:
        make_bundle(out, key, seed=9)
        (out / "notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(UsageError):
        make_bundle(out, key)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_blobs_from_files_are_linked_and_checked(tmp_path: Path, key: Path) -> None:
    manifest, blobs = make_manifest()
    cache = tmp_path / "cache"
    cache.mkdir()
    paths: dict[str, Path | bytes] = {}
    for sha256, data in blobs.items():
        (cache / sha256).write_bytes(data)  # type: ignore[arg-type]
        paths[sha256] = cache / sha256
    made = write(tmp_path / "out", key, manifest, paths)
    assert (made.path / "blobs" / manifest.golden.blob.sha256).stat().st_nlink == 2
    (cache / manifest.golden.blob.sha256).write_bytes(b"x" * manifest.golden.blob.size)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(BundleError):
        write(tmp_path / "out", key, manifest, paths)
    assert not (tmp_path / "out").exists()


def test_blobs_that_were_not_made_and_a_signer_that_fails_leave_nothing(tmp_path: Path) -> None:
    manifest, blobs = make_manifest()
    with pytest.raises(BundleError, match="not made"):
        bundle.write_bundle(tmp_path / "out", manifest, {}, lambda _: b"")

    def fail(_: bytes) -> bytes:
        raise UsageError("no key")

    with pytest.raises(EdgevitError, match="no key"):
        bundle.write_bundle(tmp_path / "out", manifest, blobs, fail)
    assert list(tmp_path.iterdir()) == []


def test_an_index_of_chunks_that_does_not_fit_the_blobs_is_refused(key: Path, tmp_path: Path) -> None:
    manifest, blobs = with_chunk_index(*make_manifest())
    good = write(tmp_path / "good", key, manifest, blobs)
    assert bundle.open_bundle(good.path, None).read_chunk_index() == blobs[manifest.chunks.sha256 if manifest.chunks else ""]
    sha256 = hashlib.sha256(b"other").hexdigest()
    for wrong in (b"junk", make_index({sha256: b"other"})):
        blob = wire.Blob(hashlib.sha256(wrong).hexdigest(), len(wrong))
        made = write(tmp_path / blob.sha256, key, dataclasses.replace(manifest, chunks=blob), {**blobs, blob.sha256: wrong})
        with pytest.raises(BundleError, match="chunk index"):
            bundle.open_bundle(made.path, None)


def test_only_the_version_may_differ_for_the_same_content() -> None:
    manifest, _ = make_manifest()
    assert bundle._same_but_version(manifest, dataclasses.replace(manifest, version=99))
    assert not bundle._same_but_version(manifest, dataclasses.replace(manifest, made_by="someone else"))
