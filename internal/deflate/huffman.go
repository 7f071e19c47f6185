package deflate

import (
	"math/bits"
	"slices"
)

// code is a prefix code of one alphabet: for each symbol reversed bits<<8 | their
// number, 0 for one that does not occur.
type code [286]uint32

// symbolBits is how the sorting tells symbols of equal frequency apart.
const symbolBits = 9

// make finds the code for symbols that occur this often; none is longer than
// longest. At least two symbols get one, as not all readers take fewer. With the
// lengths the code is given: RFC 1951, section 3.2.2.
func (c *code) make(often []uint32, longest int, lengths []uint8) {
	var order [286]uint32
	n := 0
	for symbol, times := range often {
		if times > 0 {
			order[n] = times<<symbolBits | uint32(symbol)
			n++
		}
	}
	for symbol := 0; n < 2; symbol++ {
		if often[symbol] == 0 {
			order[n] = 1<<symbolBits | uint32(symbol)
			n++
		}
	}
	slices.Sort(order[:n])

	// Lengths without a limit, from the rarest on: Moffat and Katajainen, "In-place
	// calculation of minimum-redundancy codes", 1995.
	var a [286]uint32
	for i := range n {
		a[i] = order[i] >> symbolBits
	}
	depths(a[:n])

	// The limit: whatever is longer is cut, and shorter codes grow until the sum of
	// 2^-length is 1 again.
	var count [maxCode + 1]int
	for _, depth := range a[:n] {
		count[min(int(depth), longest)]++
	}
	sum := 0
	for length := 1; length <= longest; length++ {
		sum += count[length] << (longest - length)
	}
	for ; sum > 1<<longest; sum-- {
		count[longest]--
		for length := longest - 1; ; length-- {
			if count[length] > 0 {
				count[length]--
				count[length+1] += 2
				break
			}
		}
	}
	clear(lengths)
	at := 0
	for length := longest; length > 0; length-- {
		for range count[length] {
			lengths[order[at]&(1<<symbolBits-1)] = uint8(length)
			at++
		}
	}
	c.assign(lengths)
}

// depths replaces frequencies, in ascending order and at least two, by the lengths
// of their codes.
func depths(a []uint32) {
	n := len(a)
	leaf, root := 0, 0
	pick := func(next int) uint32 {
		if leaf < n && (root >= next || a[leaf] <= a[root]) {
			leaf++
			return a[leaf-1]
		}
		v := a[root]
		a[root] = uint32(next)
		root++
		return v
	}
	for next := range n - 1 {
		v := pick(next)
		a[next] = v + pick(next)
	}
	a[n-2] = 0
	for i := n - 3; i >= 0; i-- {
		a[i] = a[a[i]] + 1
	}
	free, used := 1, 0
	depth := uint32(0)
	root, next := n-2, n-1
	for free > 0 {
		for ; root >= 0 && a[root] == depth; root-- {
			used++
		}
		for ; free > used; free-- {
			a[next] = depth
			next--
		}
		free, used = 2*used, 0
		depth++
	}
}

func (c *code) assign(lengths []uint8) {
	var next [maxCode + 2]uint16
	for _, length := range lengths {
		next[length+1]++
	}
	next[1] = 0
	for length := 1; length <= maxCode; length++ {
		next[length+1] = (next[length] + next[length+1]) << 1
	}
	for symbol, length := range lengths {
		c[symbol] = 0
		if length > 0 {
			c[symbol] = uint32(bits.Reverse16(next[length])>>(16-length))<<8 | uint32(length)
			next[length]++
		}
	}
}
