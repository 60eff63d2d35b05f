"""tinydiff: a folder of captioned images to a text-to-image model that runs wherever onnxruntime runs."""

__version__ = "0.1.0"
