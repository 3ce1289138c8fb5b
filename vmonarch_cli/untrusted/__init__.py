"""Files and texts that strangers wrote: read with limits, refused in one sentence."""
