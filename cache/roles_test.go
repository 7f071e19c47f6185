package cache

func beKilled(dir, seed string) {}
func beHolder(dir string)       {}
func beMany(dir string)         {}
