"""From text to tokens and back, so that nothing that was typed becomes a control token."""
