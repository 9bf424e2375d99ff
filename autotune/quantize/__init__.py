"""`autotune quantize`: a quantized checkpoint, what it costs, and a card that says both."""
