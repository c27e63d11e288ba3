"""Grafana dashboards of elastic_pt as code. `python -m dashboards` writes the JSON files that lie beside this code.

    panels       kinds of panels, on grafana-foundation-sdk
    layout       a dashboard: rows of panels, variables, annotations, links
    boards       all of them; which metric is on none
    pictures     what a real Prometheus answers, drawn without Grafana
    run, cost    Run: is it learning, what is it costing, what would be lost, when will it end
    faults       Faults and recovery
    checkpoints  Checkpoints and storage
    performance  Performance
    fleet        Fleet: node by node

`elastic_pt/dashboards/` links to the JSON files, so that they are part of the installed package.
"""
