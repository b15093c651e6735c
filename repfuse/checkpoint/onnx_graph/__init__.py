"""ONNX files as networks: read into a module whose forward does what the graph does, and written again as edits of it.

Needs the extra ``onnx``, and is imported where such a file is given.
"""
