"""What the losses of six libraries are on our axes, and where ours differ on purpose."""
