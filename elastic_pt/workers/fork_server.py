"""Imported by the fork server alone, as it starts: from then on it dies with its agent.

The one module that acts when it is imported, because a preloaded import is all that Python lets a fork
server do for itself. Left alone, a fork server lives as long as any of its workers does (each holds a copy
of the pipe whose end would tell it), so a hung worker would survive its agent for ever.
"""

from elastic_pt.workers.forking import die_with_parent

die_with_parent()
