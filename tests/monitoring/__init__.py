"""The files of deployments/monitoring against a real Prometheus that scrapes a real server."""
