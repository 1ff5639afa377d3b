"""What a launch of static attention is told: addresses (int64, 0 where there is none), and numbers (int32).

static_layer.py gives them in this order. Strides are bytes; P_Z... are the zero points of queries, keys, values, scores
and the context, and P_SCORE and P_CONTEXT what their rules read, two numbers each.
"""

(A_Q, A_K, A_V, A_OUT, A_TABLE, A_KEEP, A_CLASSES, A_TABLES, A_WEIGHTS, A_COUNT) = range(10)
(P_H, P_L, P_S, P_D, P_DV, P_D_UP, P_DV_UP, P_L_ROWS, P_S_ROWS, P_ZQ, P_ZK, P_ZV, P_ZS, P_ZC, P_SCORE, P_SCORE_2,
 P_CONTEXT, P_CONTEXT_2, P_LOW, P_HIGH, P_OUT_B, P_OUT_ROW, P_KEEP_B, P_KEEP_H, P_KEEP_L, P_KEEP_S,
 P_CLASS_B, P_CLASS_H, P_CLASS_L, P_CLASS_S, P_WEIGHTS_HEAD, P_WEIGHTS_ROW, P_WEIGHTS_FIRST, P_COUNT) = range(34)
