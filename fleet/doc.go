// Package fleet is where the server knows its nodes: which there are, and which
// images each is to have before anybody starts them. Nodes tell of themselves and ask
// for work through package api; package readiness's Ready images come in through Ready.
// What it keeps stands in one file (bbolt), and all of it comes back by itself when
// the file is lost: nodes by their next heartbeat, images by the catch-up below.
//
// # Warms
//
// A Warm is one image that one node is to have. Its id is derived from node and image
// (by digest where that is known), so that asking twice is asking once.
//
//	from      to        who, and when
//	-         Pending   Want, Ready, Seen (catch-up): the node is to have the image
//	Pending   Fetching  Report: the node took it up
//	Pending   Failed    Want, Ready, Seen: it gave way, for the node has too many waiting
//	Pending   -         Ready: every tag of a rule's image moved on before a node took it up
//	Fetching  Pending   Seen: the node's daemon started anew; Run: no report for a while
//	any but - Warm      Report: all is there
//	any but - Failed    Report: with the reason
//	Warm      Pending   Want: a person asks again, and the node may have evicted it since
//	Failed    Pending   Want, Ready: asked for again
//	Warm      -         Run: finished a while ago, or to make room; Failed likewise
//	any       -         Run: the node was forgotten
//
// A crash leaves a Warm as it was before the last step or after it.
//
// # Rules
//
// An image that becomes Ready is brought to the nodes that match a configured Rule and
// are not silent. A node that is heard of for the first time, again after it was
// silent, with other labels, or for the first time since the server started, is caught
// up with: it gets what became Ready lately, of each tag the newest. What is Warm or
// Failed there stays so. An image that became Ready before that is not brought.
package fleet
