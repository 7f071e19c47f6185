// Package prefetch is the step between a lazy mount and the registry: it decides which bytes of
// which layers are fetched when, and brings them. Package lazyfs asks it for what a read missed and
// keeps what it brings (Content); package registry has the bytes (Source). It knows neither of them.
//
// # Who comes first
//
// A miss (Fill: somebody waits) before the hot set (Hot: somebody will wait soon) before completion
// in the background (all the rest, so that the layer needs neither registry nor holder any more). All
// three are flights: one claims a run of gzip members that nobody else is bringing, asks for them with as few
// ranged requests as may be, and puts each chunk the moment that it is inflated. Whoever waits for a chunk is
// woken then, whoever brought it.
//
// While a flight that somebody waits for delivers, the others of its host take a quarter of the link:
// enough that a program which reads everything in no order is not slower than a pull, and
// that a small miss does not queue behind 16 MiB. While it waits for its first byte the link is free, and the hot set uses
// all of it. The background holds back longer, with one connection: for half a second after each miss, while the hot set is
// on its way, and for ten seconds after a layer was added or Hot was called, since a program is about to start (link.active).
// And it waits altogether while the hot set comes and for five seconds after, unless something else is missed: then
// the program has all that it reads, and wants the processors (link.serves).
//
// # The way of a byte
//
//	demand.go      a miss -> waiting, and trying again
//	ahead.go       a miss -> what to ask for, how far ahead; joining and overtaking flights
//	dispatch.go    hot set and background -> flights, as connections become free
//	flight.go      a flight -> room, copies, and what its end means
//	request.go     a flight -> requests -> batches of members, read ahead of inflating
//	response.go    one request's bytes, timed, slowed down and given up
//	decode.go      batches -> chunks, put and told to who waits
//	persist.go     what was put -> synced -> marked in the durable index, in batches
//	stream.go      one blob that has chunks of all layers -> chunks, put and told to who waits
//	wide.go        a blob that comes slowly -> several requests, read in order
//	twin.go        a chunk that another layer has is copied, and not fetched
//
// link.go measures each host: windows, patience and shares follow from its latency and rate.
package prefetch
