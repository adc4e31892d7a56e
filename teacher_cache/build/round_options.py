"""The options of a round: what it takes from its cache, and what may differ."""

from __future__ import annotations

from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.core.prompts.sources import open_examples
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.job import read_saved_options
from dpkd.teacher_cache.store.reader import TeacherCache

#: what made the cache's prompts. A round reads the prompts themselves, so its results do not depend on these
OF_PROMPTS = ("turns", "thinking", "template_arg")


def with_cache_options(cache: TeacherCache, config: CacheConfig) -> CacheConfig:
    """`config` with the options of the cache; raises `UserError` for one that is given and differs."""
    cache.check_one_teacher()
    identities = cache.manifest.identities
    if config.data is not None:
        actual = open_examples(config.data).identity["sha256"]
        if actual != identities["data"]["sha256"]:
            raise UserError(
                "the data is not that of the cache",
                found=f"sha256 {actual[:12]} of {config.data}",
                expected=f"{identities['data']['sha256'][:12]} of {identities['data']['name']}",
                where=cache.folder,
                advice="Leave --data out: a round uses the cache's prompts",
            )
    taken = _taken_from(cache)
    for key, value in taken.items():
        given = getattr(config, key)
        if key in config.model_fields_set and given != value:  # also a default: someone wrote it down
            raise UserError(
                f"a round uses the {key} of its cache",
                found="none" if given is None else given,
                expected=value,
                where=cache.folder,
                advice=f"Leave {config.flag(key)} out",
            )
    # responses of other lengths or another temperature are not what training compares: only if someone asks for them
    drawn = {key: identities["generation"][key] for key in ("max_new_tokens", "temperature", "top_p")}
    given = {key: getattr(config, key) for key in drawn if key in config.model_fields_set}
    if unknown := [key for key, value in drawn.items() if value is None and key not in given]:
        raise UserError(
            f"the cache was merged from caches that differ in their {unknown[0]}, so a round does not know its own",
            where=cache.folder,
            advice=f"Give {config.flag(unknown[0])}",
        )
    if differing := [key for key, value in given.items() if drawn[key] not in (None, value)]:
        ours, theirs = (", ".join(f"{key} {values[key]}" for key in differing) for values in (given, drawn))
        say(f"the student's responses are drawn with {ours}; those of the cache were with {theirs}")
    config = config.model_copy(update=taken | drawn | given)
    if config.teacher_mix is not None and (config.temperature, config.top_p) != (1, 1):
        raise UserError(
            "a mixture with the teacher is one of the models' own distributions",
            found=f"temperature {config.temperature}, top_p {config.top_p}",
            expected="temperature 1, top_p 1",
            where=config.out,
            advice="Give --temperature 1 --top-p 1, or leave --teacher-mix out",
        )
    return config


def _taken_from(cache: TeacherCache) -> dict[str, Any]:
    """The options that a round takes from its cache, with the cache's values."""
    identities = cache.manifest.identities
    generation, template = identities["generation"], identities["template"]
    return {
        "dtype": identities["teacher"]["dtype"],
        "template": template["name"],
        "limit": identities["data"]["limit"],
        "responses": generation["responses"],
        "num_samples": generation["num_samples"],
        "max_prompt_tokens": generation["max_prompt_tokens"],
        "rows_per_shard": cache.rows_per_shard,
        "turns": _turns(cache),
        "thinking": generation.get("thinking") or "keep",
        "template_arg": template.get("args", {}),
    }


def _turns(cache: TeacherCache) -> str:
    """The `turns` of the cache. Its identity has them only where some row has several; its saved options always.

    Caches of dpkd 0.1.0, and imported and merged ones, have no such option: their rows end with the last turn.
    """
    if "turns" in cache.manifest.identities["generation"]:
        return "all"
    saved = read_saved_options(cache.folder, "Restore it: a round takes options of its cache from it")
    return str(saved.get("turns", "last"))
