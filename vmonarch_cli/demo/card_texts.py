"""Texts of the model card, whose figures `card` fills in."""

TEMPLATE = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---

# The vmonarch demo model

A text-to-video model of {total_millions:.1f} million parameters ({megabytes:.1f} MB in float16) that draws moving
shapes: {frames} frames of {sizes_trained} pixels at 16 frames a second. It exists so that vmonarch can be tried,
tested and measured without a download. It loads through `WanPipeline`, like the large models it stands in for.

## Parts

| part | class | parameters |
| --- | --- | --- |
| transformer | `WanTransformer3DModel`, {layers} layers, {heads} heads of {head_dim} | {transformer_millions:.2f} M |
| autoencoder | `AutoencoderKLWan`, 4x in space and time, {z_dim} channels | {vae_millions:.2f} M |
| text encoder | `UMT5EncoderModel`, {text_layers} layers of {d_model} | {text_millions:.2f} M |
| tokenizer | word level, {words} tokens | |
| scheduler | `UniPCMultistepScheduler` on flow sigmas, shift {flow_shift:g} | |

Run it with {sampling} and `max_sequence_length=32`. The token grid of 49 frames of 96 x 96 is
13 x 12 x 12.{long_clips}

## Data

Clips rendered by `vmonarch_cli/demo/clips.py` while training; nothing was collected. One or two shapes
({shapes}) in {colours}, {sizes}, {motions}; backgrounds {backgrounds}, {kinds}. Captions are built from about
{words} words in many sentence patterns. One in eleven combinations of shape, colour and motion never occurs in
training; the held-out prompts below each have one. Training sees pairs and fast motions more often than they are asked
for below.{longer}

## Training

| part | steps | clips seen | wall clock | device |
| --- | --- | --- | --- | --- |
{training}

Wall clock includes compilation and evaluation. The text encoder learns to name what a caption says and is then left as
it is. While the transformer learns, a small head that is not in this folder reads the objects' outlines from its
middle, and the loss weighs more where objects are; both fade out. The transformer's last flow-matching loss was
{dit_loss:.4f}.{structured}

To train again: `python -m vmonarch_cli.demo.training vae --out DIR`, then `text --out DIR`, then
`dit --vae DIR/vae --text DIR --out DIR`{again}.{adapters}

## Measured

{measured}
## Limits

- It knows the words of `vmonarch_cli/models/demo_vocabulary.py` and nothing else; the command line names the words
  that it does not know.
- It was trained at {frames} frames of {sizes_trained} pixels only. Other sizes and lengths run but were not trained.
- At most two objects, in separate places. Left unsaid, size and background are chosen at random.
- It says nothing about how structured attention does on large models: attention here is over {tokens} tokens, and
  the clips are simple.
"""

AGAIN = """; for the last training, `text --init WEIGHTS --out DIR`
and `dit --vae WEIGHTS/vae --text DIR --init WEIGHTS {flags} --clips {clips} --out DIR`"""

LONGER = """

Clips longer than 49 frames were trained at {lengths}. There, motions that repeat keep their speed and the others take
their time, and one object may move in several ways, one after the other ("rises, then circles"): in two in 97 frames,
in up to three from 145 on. Shorter clips show a whole motion, faster."""

LONG_CLIPS = """ The program samples clips of {frames} frames and more with {sampling}."""

MEASURED = """### {frames} frames of {size} x {size}

Autoencoder on {vae_eval_clips} held-out clips: {vae_psnr:.2f} dB PSNR, worst clip {vae_worst:.2f} dB; first, middle and
last frame {vae_first:.2f}, {vae_middle:.2f} and {vae_last:.2f} dB.

Share of clips that show what their prompt says, on {prompts} held-out prompts ({pairs} of them with two objects, which
must both be right{several}), {sampling}, on {score_device}, read from the pixels by `vmonarch_cli/demo/reader.py`:

| | colour | background | motion | shape |
| --- | --- | --- | --- | --- |
{agreement}
| the reader itself, on {reader_clips} rendered clips | {reader} |
| and on the autoencoder's reconstructions of {through_clips} of them | {through} |
{distances}"""

STRUCTURED = """

In the training marked as tuned, half of every batch repeats the other half's clips with Monarch attention (one part as
preset `paper` runs it, one with every frame's own keys exact besides), and the loss asks that both halves agree: the
paper tunes its models with its attention, too. Presets are therefore closer to dense here than on a model that never
saw them."""
ADAPTERS = """

## Adapters

`vmonarch_cli/demo/tuned` has adapters that `vmonarch tune` made of these weights, from prompts alone. Each belongs to
one preset at so many steps, such a guidance and so many frames, and is used there without being asked for; `--tuned
none` leaves it out. Dense attention never runs with one. "Rank A of B" was trained at rank B and cut to A since, as the
guide says. Mean relative error of the latents on further held-out prompts, at the rank of training:

| preset | steps | guidance | frames | made on | prompts | error before | after |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}"""
