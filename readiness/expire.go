package readiness

import (
	"context"

	"accel"
)

// expirePage bounds how many records are read at a time.
const expirePage = 500

// ExpireLeases lets every lease run out now and returns how many there were. It is for
// a process that has the store to itself and has just started: whoever held a
// lease is dead, and its work need not wait. The attempts that died stay counted,
// so that an image that kills its worker is given up in the end.
func (t *Tracker) ExpireLeases(ctx context.Context) (n int, err error) {
	err = t.update(ctx, func(c *change) error {
		n = 0
		for before := uint64(0); ; {
			es, err := c.List(accel.Converting, "", before, expirePage)
			if err != nil || len(es) == 0 {
				return err
			}
			for _, e := range es {
				e.DueAt = c.now
				if err := c.put(e); err != nil {
					return err
				}
				n++
			}
			before = es[len(es)-1].Seq
		}
	})
	return n, err
}
