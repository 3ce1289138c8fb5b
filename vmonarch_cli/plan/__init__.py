"""From a request to a checked `Plan`: settings, shapes, costs, memory and expected time, without torch."""
