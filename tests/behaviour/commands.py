"""The command lines whose behaviour is recorded."""

from __future__ import annotations

from collections.abc import Iterator

from running import Command

MODELS = (
    "demo",
    "wan2.1-1.3b",
    "wan2.1-14b",
    "wan2.2-5b",
    "wan2.2-a14b",
    "wan2.1-i2v-480p",
    "wan2.1-i2v-720p",
    "wan2.2-i2v-a14b",
    "wan2.1-vace-1.3b",
    "wan2.1-vace-14b",
    "skyreels-v2-t2v",
    "skyreels-v2-i2v",
    "hunyuan-video",
    "hunyuan-video-i2v",
    "hunyuan-video-1.5",
    "hunyuan-video-1.5-i2v",
    "cogvideox-2b",
    "cogvideox-5b",
    "cogvideox-1.5",
    "cogvideox-5b-i2v",
    "cogvideox-1.5-i2v",
    "ltx-video",
    "ltx-2",
    "mochi-1",
    "allegro",
    "kandinsky-5-lite",
    "motif-video-2b",
    "minimax-h3",
    "cosmos-predict2.5-2b",
    "anyflow-14b",
)
PRESETS = ("paper", "fast", "balanced", "quality", "exact", "dense")
PROMPT = '-p "a red circle moving from left to right on a blue background"'
TINY = f"{PROMPT} --size 32x32 --num-frames 9 --steps 2 --device cpu --dtype float32"
SMALL = f"{PROMPT} --size 48x64 --num-frames 17 --steps 3 --seed 4 --device cpu --dtype float32"


def everything() -> list[Command]:
    """All commands, in the order in which they are recorded; a name occurs once in its group."""
    found = [*clips(), *chains(), *profiles(), *helps(), *lists(), *plans(), *files(), *errors(), *batch_errors()]
    names = [(command.group, command.name) for command in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"recorded twice: {sorted(twice)}")
    return found


def helps() -> Iterator[Command]:
    """Every help text, at the default width."""
    for words in (
        *("", "generate", "plan", "decode", "compare", "gallery", "rerun", "doctor", "presets", "presets show"),
        *("presets check", "models", "models show", "profile", "profile kernel", "profile model", "profile quality"),
        *("profile clip", "tune", "demo"),
    ):
        yield Command("help", words or "vmonarch", f"{words} --help".strip())
    yield Command("help", "no command", "")
    yield Command("help", "short option", "plan -h")
    yield Command("help", "version", "--version")


def lists() -> Iterator[Command]:
    """Presets, models and the machine."""
    yield Command("presets", "list", "presets")
    for name in PRESETS:
        yield Command("presets", f"show {name}", f"presets show {name}")
    yield Command("presets", "show own", "presets show ./own.toml")
    yield Command("presets", "check own", "presets check own.toml")
    for name in ("wrong-field.toml", "wrong-value.toml", "not-toml.toml", "missing.toml"):
        yield Command("presets", f"check {name}", f"presets check {name}")
    yield Command("presets", "show unknown", "presets show papr")
    yield Command("models", "list", "models")
    yield Command("models", "show unknown", "models show wan")
    for name in MODELS:
        yield Command("models", f"show {name}", f"models show {name}")
    yield Command("doctor", "text", "doctor", columns=400, slow=True)


def plans() -> Iterator[Command]:
    """`plan` and `generate --dry-run` over models, shapes, presets and what goes beside the attention."""
    takes_image = [name for name in MODELS if "i2v" in name]
    for name in MODELS:
        image = " --image picture.png" if name in takes_image else ""
        yield Command("plan_models", name, f"plan -m {name}{image} -p 'a cat on a wave' --json")
    for name in PRESETS:
        yield Command("plan", f"preset {name}", f"plan {PROMPT} --preset {name}", columns=160)
        yield Command("plan", f"preset {name} of wan", f"plan -m wan2.1-1.3b {PROMPT} --preset {name} --json")
    text = {
        "wan2.1-1.3b": "plan -m wan2.1-1.3b -p 'a cat'",
        "wan2.2-a14b": "plan -m wan2.2-a14b -p 'a cat' --guidance-scale-2 2.5 --steps 30",
        "long clip of the demo": "plan -p 'a red circle rising' --num-frames 97",
        "hunyuan": "plan -m hunyuan-video -p 'a cat' --size 960x544 --num-frames 97",
        "cogvideox": "plan -m cogvideox-5b -p 'a cat' --preset quality",
        "ltx": "plan -m ltx-video -p 'a cat' --num-frames 97 --fps 24",
        "mochi": "plan -m mochi-1 -p 'a cat' --preset fast",
        "flags of the shape": f"plan {PROMPT} --height 64 --width 80 --num-frames 21 --fps 8",
        "flags of sampling": f"plan {PROMPT} --steps 7 --guidance-scale 1 --flow-shift 3 --seed 12 --num-videos 3",
        "set": f"plan {PROMPT} --preset fast --set band=2 --set refresh=1.5 --set c_floor=0.2",
        "dense": f"plan {PROMPT} --preset balanced --dense-steps 2 --dense-layers 1 --dense-every 4",
        "own preset": f"plan {PROMPT} --preset ./own.toml",
        "impl": f"plan {PROMPT} --impl reference --dtype bf16 --device cpu",
        "image": "plan -m wan2.1-i2v-480p --image picture.png -p 'a cat'",
        "first frame of text model": "plan -m wan2.2-5b --image picture.png -p 'a cat'",
        "first and last frame": "plan -m minimax-h3 --image picture.png --last-image picture.png -p 'a cat'",
        "quantize": "plan -m wan2.1-14b -p 'a cat' --quantize fp8 --offload model",
        "lora and cache": "plan -m wan2.1-1.3b -p 'a cat' --lora lora.safetensors:0.5 --cache pab --vae-tiling",
        "compile": "plan -m wan2.1-1.3b -p 'a cat' --compile --offload group --device cuda",
        "output": f"plan {PROMPT} -o folder/ --num-videos 2",
        "quiet": f"plan {PROMPT} -o x.gif --fps 10 --quiet",
        "unknown words": "plan -p 'a translucent zebra over the Matterhorn'",
        "negative": "plan -m wan2.1-1.3b -p 'a cat' --negative-prompt 'blurry'",
    }
    for name, args in text.items():
        yield Command("plan", name, args, columns=160)
    for name in ("set", "dense", "flags of sampling", "quantize", "image", "lora and cache", "unknown words"):
        yield Command("plan", f"{name} as JSON", f"{text[name]} --json")
    yield Command("plan", "dry run", f"generate --dry-run {PROMPT} -o x.mp4", columns=160)
    yield Command("plan", "dry run as JSON", f"generate --dry-run {PROMPT} --json -m wan2.1-1.3b --preset fast")
    yield Command("plan", "dry run at the default width", f"generate --dry-run {PROMPT}")


def files() -> Iterator[Command]:
    """Plans of prompts files."""
    for name in ("two.txt", "clips.jsonl", "clips.yaml", "clips.csv"):
        yield Command("plan_files", name, f"plan --prompts-file {name} -o batch/", columns=160)
        yield Command("plan_files", f"{name} as JSON", f"plan --prompts-file {name} -o batch/ --json")
    yield Command("plan_files", "stdin", "plan --prompts-file - -o batch/", stdin="a red circle\n", columns=160)
    yield Command(
        "plan_files",
        "stdin as yaml",
        "plan --prompts-file - --prompts-format yaml -o batch/ --json",
        stdin="- a red circle\n",
    )
    yield Command("plan_files", "flags", "plan --from-file clips.jsonl --steps 9 --seed 2 --quiet -o batch/")
    yield Command("plan_files", "dry run", "generate --prompts-file clips.yaml --dry-run --preset fast", columns=160)
    yield Command("plan_files", "of wan", "plan -m wan2.1-1.3b --prompts-file clips.yaml --json")


def errors() -> Iterator[Command]:
    """Sentences and exit codes for bad input."""
    cases = {
        "no prompt": "generate",
        "empty prompt": "generate -p ' '",
        "unknown model": "plan -m wan2.1-1.3 -p a",
        "no folder": "plan -m ./missing -p a",
        "folder without a model": "plan -m ./blocked -p a",
        "unknown preset": "plan -p a --preset papr",
        "missing preset file": "plan -p a --preset ./missing.toml",
        "preset file with a wrong field": "plan -p a --preset ./wrong-field.toml",
        "preset file with wrong values": "plan -p a --preset ./wrong-value.toml",
        "size that is no size": "plan -p a --size big",
        "size off the grid": "plan -p a --size 90x90",
        "size twice": "plan -p a --size 96x96 --height 96",
        "height too large": "plan -p a --height 20000",
        "frames": "plan -p a --num-frames 10",
        "frames of mochi": "plan -m mochi-1 -p a --num-frames 10",
        "no frames": "plan -p a --num-frames 0",
        "frames that are no number": "plan -p a --num-frames many",
        "steps": "plan -p a --steps 0",
        "fps": "plan -p a --fps 0",
        "seed": "plan -p a --seed -2",
        "guidance": "plan -p a --guidance-scale 1000",
        "guidance that is no number": "plan -p a --guidance-scale nan",
        "second guidance": "plan -p a --guidance-scale-2 3",
        "flow shift": "plan -p a --flow-shift 0",
        "number of videos": "plan -p a --num-videos 0",
        "set without a value": "plan -p a --set band",
        "set of an unknown field": "plan -p a --set bnd=1",
        "set of a wrong value": "plan -p a --set num_steps=0",
        "set of a wrong type": "plan -p a --set warm_start=2",
        "set of the name": "plan -p a --set name=x",
        "set twice": "plan -p a --set band=1 --set band=2",
        "set and flag": "plan -p a --set dense_steps=1 --dense-steps 2",
        "dense steps": "plan -p a --dense-steps -1",
        "dense every": "plan -p a --dense-every -1",
        "impl": "plan -p a --impl cuda",
        "device": "plan -p a --device gpu",
        "dtype": "plan -p a --dtype fp8",
        "ending": "plan -p a -o x.avi",
        "empty output": "plan -p a -o ''",
        "clip exists": "plan -p a -o taken.mp4",
        "clip is a folder": "plan -p a -o picture.png --overwrite",
        "folder is a file": "plan -p a -o taken.mp4/clips/",
        "fast gif": "plan -p a -o x.gif --fps 60",
        "image not taken": "plan -p a --image picture.png",
        "image missing": "plan -m wan2.1-i2v-480p -p a --image missing.png",
        "image broken": "plan -m wan2.1-i2v-480p -p a --image broken.png",
        "no image": "plan -m wan2.1-i2v-480p -p a",
        "offload": "plan -p a --offload disk",
        "quantize": "plan -p a --quantize int4",
        "cache": "plan -p a --cache tea",
        "lora missing": "plan -p a --lora missing.safetensors",
        "lora scale": "plan -p a --lora lora.safetensors:much",
        "unknown flag": "plan -p a --colour red",
        "near flag": "generate -p a --num-frame 9",
        "unknown command": "make -p a",
        "extra argument": "plan a red circle",
        "flag without a value": "plan -p",
        "error as JSON": "plan -p a --size big --json",
        "unknown flag as JSON": "plan -p a --colour red --json",
        "unknown model as JSON": "generate -m nothing -p a --json",
        "triton on the CPU": "generate -p 'a red circle' --impl triton --device cpu",
        "gallery of nothing": "gallery blocked",
        "gallery of no folder": "gallery missing",
        "rerun of nothing": "rerun missing.json",
        "rerun of another file": "rerun other.json",
        "decode of nothing": "decode blocked",
        "decode of no file": "decode missing.latents.safetensors",
        "decode of a broken file": "decode broken.latents.safetensors",
        "compare of dense": f"compare {PROMPT} --preset dense",
        "compare of one file": "compare other.json",
        "compare of other files": "compare other.json taken.mp4",
        "profile shape": "profile kernel --shape 3",
        "profile frames": "profile kernel --shape 300x10",
        "profile dense preset": "profile kernel --preset dense",
        "profile impl": "profile kernel --impl fast",
        "profile backend": "profile model --backend slow",
        "profile family": "profile model -m mochi-1 --random-weights",
        "profile clip preset": "profile clip --preset dense",
        "profile sweep": "profile quality --sweep some",
        "profile prompts": "profile quality --prompts 0",
        "profile error as JSON": "profile kernel --shape 3 --json -",
        "profile plot": "profile kernel --plot x.pdf",
    }
    for name, args in cases.items():
        yield Command("errors", name, args)
    yield Command("errors", "rank", "generate -p 'a red circle' --device cpu", env={"RANK": "one", "WORLD_SIZE": "2"})


def batch_errors() -> Iterator[Command]:
    """Sentences and exit codes of batches."""
    cases = {
        "missing": "plan --prompts-file missing.txt",
        "ending": "plan --prompts-file prompts.dat",
        "format": "plan --prompts-file two.txt --prompts-format json",
        "empty": "plan --prompts-file empty.txt",
        "wrong jsonl": "generate --prompts-file wrong.jsonl",
        "wrong yaml": "generate --prompts-file wrong.yaml",
        "wrong csv": "generate --prompts-file wrong.csv",
        "wrong values": "plan --prompts-file wrong-values.jsonl",
        "wrong values as JSON": "plan --prompts-file wrong-values.jsonl --json",
        "prompt too": "plan --prompts-file two.txt -p a",
        "output is a file": "plan --prompts-file two.txt -o x.mp4",
        "max failures": "generate --prompts-file two.txt --max-failures 0",
        "not to be resumed and overwritten": "plan --prompts-file two.txt --no-resume --overwrite -o batch/",
    }
    for name, args in cases.items():
        yield Command("errors_batch", name, args)


def clips() -> Iterator[Command]:
    """Real clips of the demo model: pixels, records and what the run prints."""
    for name in PRESETS:
        yield Command(
            "clips", f"preset {name}", f"generate {SMALL} --preset {name} -o x.png", measured=True, columns=400
        )
    cases = {
        "default size": f"generate {PROMPT} --num-frames 13 --steps 2 --device cpu --dtype float32 -o x.png --json",
        "no guidance": f"generate {SMALL} --guidance-scale 1 --preset balanced -o x.png --quiet",
        "set": f"generate {SMALL} --preset fast --set band=1 --set refresh=2 --set c_floor=0.3 -o x.png -q",
        "dense steps and layers": f"generate {SMALL} --dense-steps 1 --dense-layers 2 --dense-every 0 -o x.png -q",
        "reference": f"generate {TINY} --impl reference -o x.png -q",
        "own preset": f"generate {SMALL} --preset ./own.toml -o x.png -q",
        "bfloat16": f"generate {PROMPT} --size 32x32 --num-frames 9 --steps 2 --device cpu --dtype bf16 -o x.png -q",
        "tiles and negative prompt": f"generate {TINY} --vae-tiling --negative-prompt blue --flow-shift 3 -o x.png -q",
        "first block cache": f"generate {TINY} --steps 4 --cache first-block -o x.png -q",
        "int8": f"generate {TINY} --quantize int8-storage -o x.png -q",
        "fp8": f"generate {TINY} --quantize fp8-storage -o x.png -q",
        "lora of another model": f"generate {TINY} --lora lora.safetensors -o x.png",
        "three seeds into a folder": f"generate {TINY} --num-videos 3 --seed 7 -o out/",
        "gif": f"generate {TINY} -o x.gif --fps 10 --quiet",
        "overwrite": f"generate {TINY} -o taken.mp4 --overwrite --quiet",
    }
    quick = ("set", "dense steps and layers", "gif", "lora of another model")
    for name, args in cases.items():
        yield Command(
            "clips", name, args, measured=True, columns=400, slow=name not in quick, in_full=name == "default size"
        )
    interpret = {"TRITON_INTERPRET": "1"}
    args = f"generate {TINY} --steps 1 --impl triton --preset balanced --dense-every 0 -o x.png --json"
    yield Command("clips", "triton", args, measured=True, columns=400, env=interpret, slow=True)


def chains() -> Iterator[Command]:
    """Commands that go on with what earlier ones made."""

    def step(folder: str, name: str, args: str, slow: bool = False, kill_at: tuple[str, str] = ("", "")) -> Command:
        return Command("chains", name, args, folder, measured=True, columns=400, slow=slow, kill_at=kill_at)

    tiny = "--size 32x32 --num-frames 9 --steps 2 --device cpu --dtype float32"
    red, green = (
        "a-red-circle-moving-from-left-to-right-on-a-blue-s0",
        "a-green-square-growing-on-a-white-background-s0",
    )
    yield step("batch", "batch", f"generate --prompts-file two.txt {tiny} -o batch/")
    yield step("batch", "batch again", f"generate --prompts-file two.txt {tiny} -o batch/")
    yield step("batch", "batch plan after", f"plan --prompts-file two.txt {tiny} -o batch/")
    yield step("batch", "batch gallery", "gallery batch")
    yield step("batch", "batch compare", f"compare batch/{red}.mp4 batch/{green}.json --json")
    yield step("rerun", "rerun: first", f"generate {TINY} --preset fast -o x.png --quiet")
    yield step("rerun", "rerun", "rerun x.json --device cpu")
    yield step("rerun", "gallery", "gallery . --json")
    yield step("rerun", "rerun as JSON", "rerun x.json --device cpu -o y.png --json", slow=True)
    yield step("rerun", "rerun onto itself", "rerun x.json -o x.png")
    yield step("rerun", "compare files", "compare x.json x-rerun.json -o pair/", slow=True)
    yield step("compare", "compare", f"compare {TINY} --preset paper --preset fast -o both/", slow=True)
    yield step("compare", "compare as JSON", f"compare {TINY} --set band=1 -o one/ --json", slow=True)
    killed = f"generate --prompts-file two.txt {tiny} --num-frames 33 -o batch/ --quiet"
    saved = ("batch/manifest.jsonl", '"event": "denoised"')
    yield step("decode", "decode: killed batch", killed, slow=True, kill_at=saved)
    yield step("decode", "decode", "decode batch --device cpu", slow=True)
    yield step("decode", "decode: batch goes on", f"{killed} --json", slow=True)


def profiles() -> Iterator[Command]:
    """What is measured is left out; what the reports are made of is not."""
    shape = "--size 32x32 --num-frames 9 --steps 2 --device cpu --dtype float32"
    cases = {
        "kernel": "profile kernel --shape 3x16 --shape 5x9 --heads 1 --head-dim 16 --repeats 2 --device cpu --json -",
        "kernel text": "profile kernel --shape 3x16 --heads 2 --head-dim 16 --repeats 2 --device cpu --json k.json",
        "model": f"profile model {shape} --preset paper --preset fast --json -",
        "quality": f"profile quality {shape} --prompts 1 --json -",
        "quality text": f"profile quality {shape} --num-frames 17 {PROMPT} --preset ./own.toml --plot plot.png",
    }
    for name, args in cases.items():
        yield Command("profiles", name, args, measured=True, columns=400, slow=name != "kernel")
