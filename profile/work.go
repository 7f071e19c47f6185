package profile

import (
	"context"
	"errors"
)

// errSpent ends the look at an image early: all is done that may be done for it. What was
// found stays.
var errSpent = errors.New("all is done that may be done for one image")

// work is what may still be done for an image. Its maker decides how long its names, patterns and
// scripts are and how often they lead to each other, so everything that costs time or memory is
// paid from here.
type work struct {
	ctx  context.Context
	left int64
	// unseen is what may be spent until ctx is looked at again.
	unseen int64
	// err says why nothing may be done any more: errSpent, ctx's cause or a failed read.
	err error
}

const (
	// maxWork bounds a prediction: a step of a lookup, a name that is listed and a byte that is made cost
	// one each. Python with pandas and scipy takes 0.1 M, Ruby with sinatra 0.2 M; all of it takes seconds.
	maxWork = 32 << 20
	// maxListWork bounds a list that people write.
	maxListWork = 16 << 20
	// workUnseen is done in less than a millisecond.
	workUnseen = 1 << 14
)

// spend pays for n, and says whether that is allowed.
func (w *work) spend(n int) bool {
	if w.err != nil {
		return false
	}
	if w.left -= int64(n); w.left < 0 {
		w.err = errSpent
		return false
	}
	if w.unseen -= int64(n); w.unseen < 0 {
		w.unseen = workUnseen
		if w.ctx.Err() != nil {
			w.err = context.Cause(w.ctx)
			return false
		}
	}
	return true
}
