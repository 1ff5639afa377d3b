"""What a launch of attention.py's kernel is told."""

FAR = 1 << 30  # beyond any distance between a query and a key

# Addresses (int64), 0 where there is none.
(A_Q, A_K, A_V, A_OUT, A_LSE, A_KEEP, A_BIAS, A_LENGTHS, A_SLOPES, A_KEY_SCALE, A_VALUE_SCALE, A_Q_SCALE,
 A_COUNT) = range(13)
# Numbers (int32). Strides are bytes, of B, H, L or S, and along the keys for masks; floats are given by their bits.
(P_H, P_GROUP, P_L, P_S, P_D, P_DV, P_CHUNKS, P_VALUE_CHUNKS, P_SPLITS, P_OFFSET, P_AT_END, P_LEFT, P_RIGHT,
 P_LENGTHS_64, P_FACTOR, P_SOFTCAP, P_Q_B, P_Q_H, P_Q_L, P_K_B, P_K_H, P_K_S, P_V_B, P_V_H, P_V_S,
 P_OUT_B, P_OUT_H, P_OUT_L, P_OUT_SPLIT, P_LSE_B, P_LSE_H, P_LSE_SPLIT, P_SUMS, P_KEEP_B, P_KEEP_H, P_KEEP_L, P_KEEP_S,
 P_BIAS_B, P_BIAS_H, P_BIAS_L, P_BIAS_S, P_SLOPES_B, P_SCALE_B, P_SCALE_H, P_SCALE_S, P_PARTS, P_COUNT) = range(47)
