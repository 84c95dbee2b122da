"""The paper's experiments: data, training runs and reports. Nothing outside `cli` imports it."""
