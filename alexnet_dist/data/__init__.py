"""From files to finished batches: sources, the plan, and the engines that carry it out."""
