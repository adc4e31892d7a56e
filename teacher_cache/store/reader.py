"""Open a finished cache by its path or URL, and read it shard by shard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.core.errors import UserError
from dpkd.core.identity import fingerprint, tokenizer_sha256
from dpkd.core.models import other_eos
from dpkd.teacher_cache.store.folder import JOB, MANIFEST, Folder
from dpkd.teacher_cache.store.folders import open_folder
from dpkd.teacher_cache.store.manifest import Manifest, read_manifest
from dpkd.teacher_cache.store.order import WINDOW_GROUPS
from dpkd.teacher_cache.store.shards import ShardRecord, read_shard, read_shards

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource
    from dpkd.teacher_cache.store.tables import ShardRows

CACHE_KIND = "teacher-cache"
ROUND_KIND = "round"
_SHORT = 12  # digits shown of a sha256
_DECODED_SHARDS = 2 * WINDOW_GROUPS  # that a reader keeps: two windows of the data order, one of pairs with a round


def round_folder(cache: Folder, name: str) -> Folder:
    """Folder of the round `name` of the cache in `cache`."""
    return cache.child(f"rounds/{name}")


@dataclass(frozen=True)
class Round:
    """A finished round: its folder and manifest. Its shards have the cache's names and rows, in the same order.

    Rows that student or teacher could not answer are missing (`Manifest.failed`).
    """

    name: str
    folder: Folder
    manifest: Manifest

    @property
    def has_sampling_logprobs(self) -> bool:
        """Whether its rows say how likely the student found each token that it drew."""
        return self.manifest.format_version >= 2

    @cached_property
    def shards_by_path(self) -> dict[str, ShardRecord]:
        """The round's shards by path, which is also the path of the cache's shard with the same rows."""
        return {shard.path: shard for shard in self.manifest.shards}


class CacheReader:
    """A cache, finished or not: its identities, and its shards, which are checked as they are read."""

    def __init__(self, folder: Folder, identities: dict[str, Any]) -> None:
        self.folder, self.identities = folder, identities
        self._read = lru_cache(maxsize=_DECODED_SHARDS)(read_shard)

    @property
    def fingerprint(self) -> str:
        """sha256 of the identities."""
        return fingerprint(self.identities)

    @property
    def vocab_size(self) -> int:
        """Width of the teacher's logits."""
        return int(self.identities["teacher"]["vocab_size"])

    @property
    def teachers(self) -> list[dict[str, Any]]:
        """The identities of its teachers: one, or several in a cache that was merged from others."""
        teacher = self.identities["teacher"]
        return list(teacher.get("several", [teacher]))

    @property
    def vocab_sizes(self) -> list[int]:
        """Widths of the logits of its teachers."""
        return sorted({int(teacher["vocab_size"]) for teacher in self.teachers})

    @property
    def top_k(self) -> int:
        """Largest number of entries kept per position; 0 if the cache has no distributions."""
        return int(self.identities["logprobs"]["top_k"])

    @property
    def ends_known(self) -> bool:
        """Whether the log-prob of every EOS is known; an endpoint may not say it."""
        return self.identities["logprobs"].get("end") != "unknown"

    @property
    def has_spans(self) -> bool:
        """Whether rows may have several spans."""
        return "spans" in self.identities["layout"].get("columns", ())

    @property
    def rows_per_shard(self) -> int:
        """Rows of every shard except the last one of each origin."""
        return int(self.identities["layout"]["rows_per_shard"])

    def scan(self, records: Iterable[ShardRecord]) -> Iterator[tuple[ShardRecord, ShardRows]]:
        """The decoded rows of `records` in order, read one shard ahead; none is kept in memory."""
        return read_shards(self.folder, records)

    def read(self, record: ShardRecord) -> ShardRows:
        """The decoded rows of one shard; the last few shards stay in memory."""
        return self._read(self.folder, record)

    def check_tokenizer(self, model: ModelSource, role: str) -> None:
        """Raise `UserError` unless `model` has the cache's tokenizer: by content (not by size), and by what it does."""
        expected, actual = self.identities["tokenizer"], model.tokenizer_identity()
        if expected["sha256"] != actual["sha256"]:
            for eos in self.identities["generation"].get("stop_token_ids") or ():  # None: merged from several
                if tokenizer_sha256(model.tokenizer, eos) == expected["sha256"]:
                    raise other_eos(model, eos, str(self.identities["teacher"]["name"]), role, where=self.folder)
            raise UserError(
                f"the {role}'s tokenizer is not the cache's",
                found=f"{_tokenizer(actual)} of {model.name}",
                expected=f"{_tokenizer(expected)} of {self.identities['teacher']['name']}",
                where=self.folder,
                advice=f"Give a {role} with the teacher's tokenizer, such as one from `dpkd init-student`",
            )
        if expected.get("probe", probe := model.tokenizer_probe()) != probe:
            raise UserError(
                f"the {role}'s tokenizer has the content of the cache's, and gives other ids",
                found=f"ids {probe[:12]} of {model.name} for a fixed text",
                expected=expected["probe"][:12],
                where=self.folder,
                advice="Use the teacher's tokenizer files and the version of transformers in the cache's manifest",
            )

    def check_teacher(self, model: ModelSource, *, advice: str) -> None:
        """Raise `UserError` unless `model` has the teacher's weights, or its config if the cache knows no weights."""
        expected = self.identities["teacher"]
        self.check_one_teacher()
        if expected["config_sha256"] is None:
            raise UserError(
                "nobody knows the weights of the cache's teacher, so no model can be compared with them",
                found=expected["name"],
                expected="a teacher that dpkd has run",
                where=self.folder,
                advice="Build the cache with another --engine",
            )
        actual = model.identity(expected["dtype"])
        # a cache that was built through a server may not know the weights
        key = "config_sha256" if expected["weights_sha256"] is None else "weights_sha256"
        if actual[key] != expected[key]:
            raise UserError(
                "the teacher is not the one of the cache",
                found=f"{key} {str(actual[key])[:_SHORT]} of {model.name}",
                expected=f"{expected[key][:_SHORT]} of {expected['name']}",
                where=self.folder,
                advice=advice,
            )

    def check_one_teacher(self) -> None:
        """Raise `UserError` for a cache whose rows have several teachers, which no model can score."""
        if len(self.teachers) > 1:
            raise UserError(
                "the rows of the cache have several teachers, and this needs the one that all of them have",
                found=", ".join(str(teacher["name"]) for teacher in self.teachers),
                where=self.folder,
                advice="Give one of the caches that it was merged from",
            )


class TeacherCache(CacheReader):
    """A finished cache. Its manifest is checked; its shards are checked as they are read."""

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        super().__init__(folder, manifest.identities)
        self.manifest = manifest

    @classmethod
    def open(cls, location: str | Path) -> TeacherCache:
        """The cache at a path or URL; raises `UserError` if it is missing, unfinished, corrupt or of another format."""
        folder = open_folder(location)
        return cls(folder, read_manifest(folder, CACHE_KIND))

    @property
    def origins(self) -> list[str]:
        """Origins of the cache's rows, in the order of the shards."""
        return sorted({shard.origin for shard in self.manifest.shards})

    def shards(self, origin: str | None = None, stem: str | None = None) -> list[ShardRecord]:
        """Shards of `origin` (None: all) whose name begins with `stem` (None: all), in order."""
        shards = [shard for shard in self.manifest.shards if origin in (None, shard.origin)]
        return [shard for shard in shards if stem in (None, shard.stem)]

    @property
    def stems(self) -> list[str]:
        """How the names of shards begin: by origin, and by turn for conversations that were asked turn by turn."""
        return list(dict.fromkeys(shard.stem for shard in self.manifest.shards))

    @cached_property
    def round_names(self) -> list[str]:
        """Names of the finished rounds."""
        names = [name.split("/") for name in self.folder.sizes("rounds")]
        return sorted(parts[1] for parts in names if len(parts) == 3 and parts[2] == MANIFEST)

    def round(self, name: str) -> Round:
        """The round `name`; raises `UserError` if it is missing, corrupt or of another cache."""
        folder = round_folder(self.folder, name)
        if name not in self.round_names and not folder.exists(JOB):
            raise UserError(
                "the cache has no such round",
                found=repr(name),
                expected=" or ".join(map(repr, self.round_names)) or "no rounds",
                where=self.folder,
                advice=f"Build it with `dpkd cache-teacher --student DIR --round {name}`",
            )
        manifest = read_manifest(folder, ROUND_KIND)
        if manifest.identities["cache"] != self.manifest.fingerprint:
            raise UserError(
                "the round belongs to another cache",
                found=manifest.identities["cache"][:16],
                expected=self.manifest.fingerprint[:16],
                where=folder,
            )
        ours = [(shard.path, shard.rows) for shard in self.manifest.shards]
        if [(shard.path, shard.num_settled) for shard in manifest.shards] != ours:
            raise UserError("the round's shards are not those of the cache", where=folder)
        return Round(name, folder, manifest)

    def read_round(self, round_: Round, record: ShardRecord) -> ShardRows:
        """The decoded rows of the round's shard that has the rows of the cache's shard `record`."""
        return self._read(round_.folder, round_.shards_by_path[record.path])


def _tokenizer(identity: dict[str, Any]) -> str:
    return f"{identity['sha256'][:12]} ({identity['num_tokens']} tokens)"
