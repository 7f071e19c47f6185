package cache

// writtenLayer is one layer as a commit puts it into the index.
type writtenLayer struct {
	l       *Layer
	changed map[int64]struct{}
	rows    map[rowKey][]byte
}

// takeLayers makes the rows of the layers that are not as in the index. s.mu is held.
func (s *Store) takeLayers() ([]writtenLayer, error) {
	all := make([]writtenLayer, 0, len(s.dirtyLayers))
	for l := range s.dirtyLayers {
		key, err := keyOf(l.digest)
		if err != nil {
			return nil, err
		}
		w := writtenLayer{l: l, changed: l.changed, rows: map[rowKey][]byte{}}
		row := layerRow{info: l.info, allocated: l.allocated, seq: l.seq, usedAt: l.usedAt, visited: l.visited, complete: l.complete}
		w.rows[rowKey{tableLayers, key}] = sealRow(tableLayers, key, row.encode())
		if l.complete && len(l.changed) > 0 {
			buryMarks(key, segmentsOf(l.info.chunks), w.rows)
		} else {
			for n := range l.changed {
				key := marksKey(key, n)
				w.rows[rowKey{tableMarks, key}] = nil
				if marks := encodeMarks(l.marks.segment(n, l.info.chunks)); marks != nil {
					w.rows[rowKey{tableMarks, key}] = sealRow(tableMarks, key, marks)
				}
			}
		}
		l.changed, l.touched = nil, false
		all = append(all, w)
	}
	clear(s.dirtyLayers)
	return all, nil
}

// settleLayer ends the commit for one layer; s.mu is held.
func (s *Store) settleLayer(w writtenLayer, failed error) {
	l := w.l
	if failed == nil || l.gone != nil {
		return
	}
	for n := range w.changed {
		l.change(n)
	}
	s.dirtyLayers[l] = struct{}{}
}

// bury removes the rows of what k was.
func (t *tomb) bury(k itemKey, rows map[rowKey][]byte) error {
	key, err := keyOf(k.digest)
	if err != nil {
		return err
	}
	if k.form == FormLayer {
		rows[rowKey{tableLayers, key}] = nil
		buryMarks(key, t.segments, rows)
		return nil
	}
	rows[rowKey{tableBlobs, key}] = nil
	return nil
}

func buryMarks(layerKey string, segments int64, rows map[rowKey][]byte) {
	for n := range segments {
		rows[rowKey{tableMarks, marksKey(layerKey, n)}] = nil
	}
}
