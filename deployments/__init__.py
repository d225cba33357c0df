"""How srlm is run by a team: the stack of servers, deployments, images, and the files that clusters read."""
