"""The report as one HTML page, which needs nothing beside itself."""
