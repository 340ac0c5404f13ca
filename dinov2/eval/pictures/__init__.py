"""Pictures of what frozen features see: patches, attention, neighbours, and a map of parts."""
