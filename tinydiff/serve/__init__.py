"""The HTTP server: OpenAI's images and videos over the same runtime as `tinydiff generate`.

HTTP threads (`app`, `images`, `videos`, `info`) turn requests into jobs. The store (`store`) keeps the jobs.
One thread (`scheduler`) owns the device and runs them. Outputs are kept as files (`files`).
"""
