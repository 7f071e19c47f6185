package cache

func beKilled(dir, seed string) {}
func beMany(dir string)         {}
