"""One clip, from its plan to its file: denoised, saved, decoded, written, recorded."""
