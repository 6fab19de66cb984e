"""The HTTP server: OpenAI's images and videos over the same runtime as `tinydiff generate`.

HTTP threads (`app`, `images`, `videos`, `info`) read requests into jobs, the store (`store`) keeps them, and
one thread (`scheduler`) owns the device and makes them. What was made lies in `files`.
"""
