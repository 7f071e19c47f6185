package fleet

import "go.etcd.io/bbolt"

// Check reads everything, as Open does.
func (f *Fleet) Check() error { return f.file.View(f.check) }

// Size is the number of ready images that are kept.
func (f *Fleet) Size() (n int, err error) {
	err = f.file.View(func(bt *bbolt.Tx) error {
		n = rows(bt.Bucket(bucketReady))
		return nil
	})
	return n, err
}
