"""The shell that two services or more share: settings, logs, telemetry, errors, servers, clients.

Knows no service. Nothing here decides anything about requests: that is `services.core`.
"""
