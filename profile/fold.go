package profile

import (
	"cmp"
	"slices"

	"accel"
)

// DefaultShare is the share of the starts that must have read a part: one half.
const DefaultShare = 0.5

// joinBytes is how far apart in first use two runs of one file may be that become
// one item: what a link of 1 Gbit/s brings in 10 ms.
const joinBytes = 1 << 20

// use is that one report reads a part of a file.
type use struct {
	span
	report int
	at     int64 // bytes that the report's start had read before
}

// segment is a run of bytes that the same reports read.
type segment struct {
	Item
	at int64 // the median of its uses
}

// Profile is what at least share of the starts read, in the order of first use; a
// share outside of (0,1] means DefaultShare. A complete report counts for what it has and
// against what it has not, any other only for what it has. It depends on the set of
// reports alone.
func (s *Summary) Profile(share float64) accel.Profile {
	if !(share > 0 && share <= 1) {
		share = DefaultShare
	}
	p := accel.Profile{Manifest: s.manifest, Origin: accel.ProfileRecorded, Starts: len(s.reports), Items: []Item{}}
	complete := 0
	uses := map[place][]use{}
	contents := map[place]map[accel.ContentID]int{}
	for n, r := range s.reports {
		if r.Complete {
			complete++
		}
		if r.StartedAt.After(p.RecordedAt) {
			p.RecordedAt = r.StartedAt
		}
		at := int64(0)
		for _, i := range r.Items {
			f := placeOf(i)
			uses[f] = append(uses[f], use{span{i.Offset, i.Offset + i.Bytes}, n, at})
			at += i.Bytes
			if contents[f] == nil {
				contents[f] = map[accel.ContentID]int{}
			}
			contents[f][i.Content]++
		}
	}
	all := make([]segment, 0, len(uses))
	for f, u := range uses {
		all = append(all, s.fold(f, mostSaid(contents[f]), u, complete, share)...)
	}
	slices.SortFunc(all, func(a, b segment) int {
		return cmp.Or(cmp.Compare(a.at, b.at), placeOf(a.Item).compare(placeOf(b.Item)), cmp.Compare(a.Offset, b.Offset))
	})
	p.Items = append(p.Items, bounded(joined(all), MaxItems, MaxHotBytes)...)
	return p
}

// mostSaid is what most uses say about a file's content; the lowest where they are
// equally many.
func mostSaid(count map[accel.ContentID]int) (id accel.ContentID) {
	most := 0
	for c, n := range count {
		if n > most || (n == most && slices.Compare(c[:], id[:]) < 0) {
			id, most = c, n
		}
	}
	return id
}

// fold cuts one file where its uses begin and end, and keeps the pieces that enough
// reports read.
func (s *Summary) fold(f place, content accel.ContentID, uses []use, complete int, share float64) (hot []segment) {
	slices.SortFunc(uses, func(a, b use) int { return cmp.Or(cmp.Compare(a.from, b.from), cmp.Compare(a.report, b.report)) })
	cuts := make([]int64, 0, 2*len(uses))
	for _, u := range uses {
		cuts = append(cuts, u.from, u.to)
	}
	slices.Sort(cuts)
	cuts = slices.Compact(cuts)
	var open []use // at most one of each report: its items do not overlap
	for n := 0; n+1 < len(cuts); n++ {
		from, to := cuts[n], cuts[n+1]
		open = slices.DeleteFunc(open, func(u use) bool { return u.to <= from })
		for len(uses) > 0 && uses[0].from == from {
			open, uses = append(open, uses[0]), uses[1:]
		}
		var whole, partial []int64
		for _, u := range open {
			if at := u.at + from - u.from; s.reports[u.report].Complete {
				whole = append(whole, at)
			} else {
				partial = append(partial, at)
			}
		}
		readers := len(whole) + len(partial)
		if readers == 0 || float64(readers) < share*float64(complete+len(partial)) {
			continue
		}
		// An incomplete report's positions lack what it did not see before them.
		positions := whole
		if len(positions) == 0 {
			positions = partial
		}
		slices.Sort(positions)
		hot = append(hot, segment{Item{Layer: f.layer, Path: f.path, Offset: from, Bytes: to - from, Content: content}, positions[(len(positions)-1)/2]})
	}
	return hot
}

// joined makes one item of segments that follow each other in their file and almost
// so in time.
func joined(ordered []segment) []Item {
	type tail struct {
		item int
		at   int64
	}
	items := make([]Item, 0, len(ordered))
	ends := map[place]map[int64]tail{}
	for _, s := range ordered {
		f := placeOf(s.Item)
		if t, ok := ends[f][s.Offset]; ok && s.at-t.at <= joinBytes+items[t.item].Bytes {
			delete(ends[f], s.Offset)
			items[t.item].Bytes += s.Bytes
			ends[f][s.Offset+s.Bytes] = tail{t.item, t.at}
			continue
		}
		if ends[f] == nil {
			ends[f] = map[int64]tail{}
		}
		ends[f][s.Offset+s.Bytes] = tail{len(items), s.at}
		items = append(items, s.Item)
	}
	return items
}
