"""The Grafana dashboards that come with the package, and their way to a Grafana.

The JSON files here are links to `dashboards/` of the repository, where the code lies that writes them. A wheel has copies.
"""

from elastic_pt.dashboards.push import push
from elastic_pt.dashboards.shipped import Choices, Dashboards, export, shipped

__all__ = ["Choices", "Dashboards", "export", "push", "shipped"]
