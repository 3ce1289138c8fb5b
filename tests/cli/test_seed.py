"""A seed that nobody chose: drawn, told, recorded, and kept by a batch that goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command import call
from typer.testing import CliRunner

from vmonarch_cli.batch.claims import Claims
from vmonarch_cli.batch.manifest import Manifest
from vmonarch_cli.cli.app import app

SMALL = ("--size", "32x32", "--num-frames", "5", "--steps", "1")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_drawn_seed_is_told_and_recorded_and_makes_the_same_clip_again() -> None:
    first = call("generate", "-p", "a red circle", *SMALL, "--seed", "-1", "-o", "a.gif")
    record = json.loads(Path("a.json").read_text())
    seed = record["seed"]
    assert record["settings"]["seed"] == {"value": seed, "origin": "flag, drawn"}
    assert f"note: seed {seed} was drawn: --seed {seed} makes the same clip\n" in first.stderr
    assert re.search(rf"(?m)^ *seed +{seed} *$", first.stdout)
    call("generate", "-p", "a red circle", *SMALL, "--seed", str(seed), "-o", "b.gif")
    assert Path("b.gif").read_bytes() == Path("a.gif").read_bytes()
    assert "identical" in call("rerun", "a.gif").stdout


def test_the_word_and_several_clips() -> None:
    plans = [
        json.loads(call("plan", "-p", "x", "--seed", word, "--json").stdout) for word in ("random", "Random", "-1")
    ]
    seeds = {plan["settings"]["seed"]["value"] for plan in plans}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**31 for seed in seeds)
    several = call("plan", "-p", "x", "--seed", "random", "--num-videos", "2", "-q")
    one, two = (int(re.findall(r"-s(\d+)\.", line)[0]) for line in several.stdout.splitlines())
    assert two == one + 1


@pytest.mark.parametrize("given", ["-2", "9223372036854775808"])
def test_what_is_no_seed_hears_of_the_random_one(given: str) -> None:
    valid = "--seed takes a whole number from 0 to 9223372036854775807, or -1 for a random one"
    assert call("plan", "-p", "x", "--seed", given, code=2).stderr == f"error: {valid}, got {given}\n"
    assert call("plan", "-p", "x", "--seed", "any", code=2).stderr == "error: --seed takes a whole number, got 'any'\n"


def test_no_seed_is_drawn_where_each_process_would_have_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    words = "error: --seed -1 would draw another seed in each process of a torchrun: give a seed\n"
    assert call("generate", "-p", "x", "--seed", "-1", "--dry-run", code=2).stderr == words


def test_a_batch_keeps_the_seeds_that_it_drew(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"prompt": "red", "seed": -1}, {"prompt": "red", "seed": "random"}, {"prompt": "blue"}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    batch = ("generate", "--prompts-file", "p.jsonl", *SMALL, "-o", "out/")
    table = call(*batch, "--dry-run").stdout
    assert table.count("random") == 2  # nothing is drawn yet that will be used
    with monkeypatch.context() as patched:  # a run that planned its clips and made none
        patched.setattr(Claims, "take", lambda self, key: (_ for _ in ()).throw(KeyboardInterrupt))
        CliRunner().invoke(app, list(batch))
    planned = {entry.line: entry.seed for entry in Manifest(Path("out")).read().values()}
    assert len(set(planned.values())) == 3
    assert planned[3] == 0
    call(*batch)
    records = [json.loads(file.read_text()) for file in Path("out").glob("*.json")]
    assert sorted(record["seed"] for record in records) == sorted(planned.values())
    origins = sorted(record["settings"]["seed"]["origin"] for record in records)
    assert origins == ["default", "prompts file, drawn", "prompts file, drawn"]
    call(*batch)  # everything is done
    assert len(list(Path("out").glob("*.mp4"))) == 3
    call(*batch, "--no-resume")  # begins again, and draws again
    assert len(list(Path("out").glob("red-*.mp4"))) == 4


def test_a_flag_draws_one_for_every_clip_of_a_batch() -> None:
    Path("p.txt").write_text("red\nred\n")
    shown = json.loads(
        call("plan", "--prompts-file", "p.txt", "--num-videos", "2", "--seed", "-1", *SMALL, "--json").stdout
    )
    assert len({clip["seed"] for clip in shown["clips"]}) == 4
    assert len({clip["key"] for clip in shown["clips"]}) == 4


def test_a_comparison_draws_one_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    done = call("compare", "-p", "red", "--preset", "fast", *SMALL, "--seed", "-1", "-o", "c/", "-q")
    assert done.exit_code == 0
    first, second = (json.loads(Path(f"c/{name}.json").read_text())["seed"] for name in ("dense", "fast"))
    assert first == second


def test_tuning_takes_a_seed_that_stays() -> None:
    refused = call("tune", "--seed", "-1", "-o", "x.safetensors", code=2)
    assert "error: --seed -1 draws another seed each time" in refused.stderr
