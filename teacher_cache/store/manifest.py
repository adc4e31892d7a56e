"""The manifest: written last, it makes a directory a finished cache and describes it."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.identity import canonical_json, content_differences, fingerprint
from dpkd.core.json_lines import loads
from dpkd.core.progress import say
from dpkd.teacher_cache.store.folder import JOB, MANIFEST, Folder
from dpkd.teacher_cache.store.schema import FORMAT_VERSION
from dpkd.teacher_cache.store.shards import ShardRecord, newer_dpkd, refuse_newer_fields, repair_advice

_FIELDS = ("kind", "identities", "skipped", "files", "software", "format_version")
_DERIVED = ("fingerprint", "counts", "mass_kept", "skipped_by_reason")


@dataclass(frozen=True)
class Manifest:
    """What a finished cache (kind `teacher-cache`) or one of its rounds (kind `round`) contains.

    Two caches with the same `identities` are the same; the hash of the identities is the fingerprint. `files` are the
    checksums of the other files in the directory. `text` counts rows whose text is not taken as it is, by reason; it is
    written only if there are any. `software`, `skipped`, `text` and `format_version` (docs/cache-format.md) are not
    part of the fingerprint.
    """

    kind: str
    identities: dict[str, Any]
    shards: list[ShardRecord]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    text: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=dict)
    format_version: int = 1

    @property
    def fingerprint(self) -> str:
        """sha256 of the identities."""
        return fingerprint(self.identities)

    @property
    def counts(self) -> dict[str, int]:
        """Rows, positions, entries and bytes over all shards."""
        return {
            "shards": len(self.shards),
            "rows": sum(shard.rows for shard in self.shards),
            "positions": sum(shard.positions for shard in self.shards),
            "entries": sum(shard.entries for shard in self.shards),
            "bytes": sum(shard.num_bytes for shard in self.shards),
            "unfinished": sum(shard.unfinished for shard in self.shards),
            "failed": sum(len(shard.failed) for shard in self.shards),
        }

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Rows that the engine could not answer: example id, sample, origin and reason."""
        return [row for shard in self.shards for row in shard.failed]

    @property
    def densities(self) -> dict[str, float | None]:
        """Bytes per position, bytes per kept entry (None without entries), and entries per position."""
        counts = self.counts
        positions, entries = max(counts["positions"], 1), counts["entries"]
        return {
            "bytes_per_position": counts["bytes"] / positions,
            "bytes_per_entry": counts["bytes"] / entries if entries else None,
            "entries_per_position": entries / positions,
        }

    @property
    def longest(self) -> int:
        """Length of the longest row, prompt and response, in tokens."""
        return max((shard.longest for shard in self.shards), default=0)

    @property
    def mass_kept(self) -> float | None:
        """Probability of the kept entries, mean over positions; None without distributions."""
        positions = sum(shard.positions for shard in self.shards)
        if not positions or not sum(shard.entries for shard in self.shards):
            return None
        return sum(shard.mass_kept for shard in self.shards) / positions

    def to_bytes(self) -> bytes:
        """The file's content: canonical JSON with its own checksum."""
        body = {
            "fingerprint": self.fingerprint,
            "counts": self.counts,
            "mass_kept": self.mass_kept,
            "skipped_by_reason": dict(sorted(Counter(row["reason"] for row in self.skipped).items())),
        } | asdict(self)
        if not self.text:
            del body["text"]
        return canonical_json(body | {"manifest_sha256": fingerprint(body)}) + b"\n"


def changed_identities(existing: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What differs between the identities of a cache and those of a command, in words.

    Caches of dpkd 0.1.0 do not say how their tokenizer encodes the probe: this is no difference. Nor are name and
    revision of a model with the same weights and config: its tokenizer, its template and the ids that end its responses
    have identities of their own.
    """
    tokenizer = existing.get("tokenizer", {})
    if tokenizer and "probe" not in tokenizer:
        ours = {**ours, "tokenizer": {key: value for key, value in ours["tokenizer"].items() if key != "probe"}}
    return content_differences(existing, ours)


def read_manifest(folder: Folder, kind: str) -> Manifest:
    """The manifest of a finished folder whose shards have the right sizes; raises `UserError` if it cannot be used.

    Options that were edited are a warning: no command but `dpkd cache repair` reads them.
    """
    manifest = load_manifest(folder, kind)
    sizes = folder.sizes("shards")
    for shard in manifest.shards:
        size = sizes.get(shard.path)
        if size != shard.num_bytes:
            raise UserError(
                "a shard of the cache is missing or incomplete",
                found="no file" if size is None else f"{size} bytes",
                expected=f"{shard.num_bytes} bytes",
                where=folder.where(shard.path),
                advice=repair_advice(folder, of_round=shard.origin == "student"),
            )
    for name in changed_files(folder, manifest):
        say(f"warning: {folder.where(name)} is not as it was when the cache was built; its rows are not affected")
    return manifest


def changed_files(folder: Folder, manifest: Manifest) -> list[str]:
    """Names of the files other than shards that are missing or have another checksum."""
    contents = folder.read_many(manifest.files)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return [name for name, digest in manifest.files.items() if digests.get(name) != digest]


def load_manifest(folder: Folder, kind: str) -> Manifest:
    """The manifest alone; raises `UserError` if it is missing, corrupt, or of another format or kind."""
    path = folder.where(MANIFEST)
    try:
        data = folder.read(MANIFEST)
    except FileNotFoundError:
        raise _without_manifest(folder) from None
    try:
        body = loads(data)
        version = body["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise newer_dpkd(f"format version {version}", f"at most {FORMAT_VERSION}", path)
        recorded = body.pop("manifest_sha256")
        # the checksum is of the file without it; to encode the parsed body again would take as long as parsing
        before, found, after = data.partition(b'"manifest_sha256":"%s",' % recorded.encode())
        digest = hashlib.sha256(before + after.removesuffix(b"\n")).hexdigest()
        intact = bool(found) and after.endswith(b"\n") and digest == recorded
        if intact:
            refuse_newer_fields(body, [*_FIELDS, *_DERIVED, "shards", "text"], path)
            shards = [ShardRecord.from_json(record, path) for record in body["shards"]]
            fields = {key: body[key] for key in _FIELDS}
            manifest = Manifest(shards=shards, text=body.get("text", {}), **fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise UserError(
            "the manifest is corrupt (checksum mismatch)",
            where=path,
            advice="Restore the file, or delete the directory and build it again with `dpkd cache-teacher`",
        )
    if manifest.kind != kind:
        raise UserError("the directory contains something else", found=manifest.kind, expected=kind, where=path)
    return manifest


def _without_manifest(folder: Folder) -> UserError:
    if not folder.sizes():
        return UserError("the cache directory is missing", where=folder, advice="Build it with `dpkd cache-teacher`")
    if folder.exists(JOB):
        what, advice = "the cache is unfinished", "Run the same `dpkd cache-teacher` command again: it resumes"
    else:
        what, advice = "the directory is not a cache", "Give the --out of a finished `dpkd cache-teacher`"
    return UserError(f"{what}: it has no manifest", where=folder, advice=advice)
