/* SPDX-License-Identifier: Apache-2.0 */
#include "lanes.h"

ss_status SS_CPU(voxel_loss_forward)(ss_exec *x, const ss_voxel_loss_forward_args *a) {
    (void)a;
    return ss_fail(x, SS_UNSUPPORTED, "logits: not yet");
}

ss_status SS_CPU(voxel_loss_backward)(ss_exec *x, const ss_voxel_loss_backward_args *a) {
    (void)a;
    return ss_fail(x, SS_UNSUPPORTED, "logits: not yet");
}
