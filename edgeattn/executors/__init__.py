"""What gives the operations of a layer their meaning."""
