module stub

go 1.19
