"""STAND-IN: see akavesdk/__init__.py."""

import sys

if "akavesdk" not in sys.modules:
    raise ImportError("No module named 'memory': import akavesdk first, it puts private/ on the path")
