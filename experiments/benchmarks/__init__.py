"""Ours beside what one would pick instead: each program measures both in turns in one run. See docs/performance.md."""
